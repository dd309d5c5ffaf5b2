"""tsp/costs: what the engine is told a step will take."""

from pathlib import Path

from tscompile.costs import sizes
from tscompile.reader import Plan


def test_sizes_double_up_to_the_limit() -> None:
    assert list(sizes(1)) == [1]
    assert list(sizes(8)) == [1, 2, 4, 8]
    assert list(sizes(100)) == [1, 2, 4, 8, 16, 32, 64, 100]


def test_a_plan_says_what_its_steps_will_take(demo_plan: Path) -> None:
    plan = Plan(demo_plan)
    costs = plan.json("tsp/costs")
    assert list(costs) == plan.manifest["targets"]
    for target, cost in costs.items():
        steps = cost["step_ns"]
        most = plan.json(f"tsp/program/{target}")["limits"]["max_tokens"]
        assert [tokens for tokens, _ in steps] == list(sizes(most))
        times = [ns for _, ns in steps]
        assert times == sorted(times)
        assert times[-1] > 4 * times[0] > 0, "512 tokens compute much, and one does not compute nothing"
        assert cost["decode_key_ps"] > cost["prefill_key_ps"] > 0, "tokens of a chunk share what they read"
