"""The engine's C ABI over real plans: what ends a request, what is refused and how, cancelling, and damaged
files."""

import os
import time
from dataclasses import replace
from pathlib import Path

import checkpoints
import engine as api
import plans
import pytest
from checkpoints import SPECS
from engine import Answer, Engine, EngineError, Plan, Request

from tscompile.reader import Plan as Reader

CONTEXT = 512


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    checkpoints.make(SPECS["llama-gqa-tied"], folder / "checkpoint")
    return plans.build(folder / "checkpoint", folder / "plan.tsp", "f32", no_text=False)


def test_what_ends_an_output(plan: Path) -> None:
    with Engine(plan) as engine:
        request = Request([7, 8, 9], max_tokens=20, ignore_eos=True)
        (free,) = engine.generate([request])
        assert (free.finish, len(free.tokens)) == ("length", 20)
        stop = free.tokens[10]
        (stopped,) = engine.generate([replace(request, stop_tokens=[stop])])
        assert stopped.finish == "stop"
        assert stopped.tokens == free.tokens[: free.tokens.index(stop) + 1]
        # the plan's end token is 0: force it, with and without ignore_eos
        forced = replace(request, logit_bias=[(0, 1e5)])
        assert [a.finish for a in engine.generate([forced, replace(forced, ignore_eos=False)])] == [
            "length",
            "stop",
        ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "num_prompt"),
        ({"prompt": [1, -1]}, r"prompt\[1\] is -1"),
        ({"prompt": [512]}, r"prompt\[0\] is 512, wanted a token id in \[0, 512\)"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": [1] * CONTEXT}, "512"),
        ({"max_tokens": CONTEXT}, "512"),
        ({"max_tokens": 2**31 - 1}, "2147483647"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"logit_bias": [(512, 1.0)]}, "logit_bias"),
        ({"logit_bias": [(5, float("nan"))]}, "logit_bias"),
        ({"stop_tokens": [-5]}, "stop_tokens"),
        ({"num_logprobs": 513}, "num_logprobs"),
    ],
)
def test_a_request_out_of_range_is_refused(plan: Path, change: dict[str, object], message: str) -> None:
    with Engine(plan, num_pages=16) as engine:
        with pytest.raises(EngineError, match=message) as refused:
            engine.submit(replace(Request([1, 2]), **change))  # type: ignore[arg-type]
        assert refused.value.status == api.BAD_REQUEST
        assert len(engine.generate([Request([1, 2], max_tokens=2)])[0].tokens) >= 1


def test_the_longest_that_fits(plan: Path) -> None:
    with Engine(plan) as engine:
        (answer,) = engine.generate([Request([3] * (CONTEXT - 1), max_tokens=1)])
        assert len(answer.tokens) == 1


def test_cancelled_requests_give_their_pages_back(plan: Path) -> None:
    with Engine(plan, num_pages=64, prefix_cache=False) as engine:
        answers = {
            engine.submit(Request([i] * 20, max_tokens=400, ignore_eos=True)): Answer() for i in range(1, 9)
        }
        while not any(answer.tokens for answer in answers.values()):
            engine.poll(answers)
        for number in answers:
            engine.cancel(number)
        engine.cancel(10**9)  # unknown ids are ignored
        waiting = set(answers)
        while waiting:
            waiting -= set(engine.poll(answers))
        assert {answer.finish for answer in answers.values()} == {"cancelled"}
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_pages_free) == (0, 0, 64)


def test_a_full_inbox_says_so(plan: Path) -> None:
    with Engine(plan, max_queue=2, max_seqs=1, num_threads=1) as engine:
        statuses = []
        for _ in range(50):
            try:
                engine.submit(Request([1] * 100, max_tokens=300, ignore_eos=True))
            except EngineError as refused:
                statuses.append(refused.status)
        assert len(statuses) > 40
        assert set(statuses) == {api.BUSY}


def test_closing_with_work_in_flight(plan: Path) -> None:
    engine = Engine(plan)
    for _ in range(20):
        engine.submit(Request([1] * 100, max_tokens=300, ignore_eos=True))
    engine.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "cpu-none"}, "cpu-none"),
        ({"num_threads": -1}, "num_threads is -1"),
        ({"num_pages": -1}, "num_pages is -1"),
        ({"token_budget": 513}, "token_budget is 513, but the plan was arranged for at most 512"),
        ({"max_seqs": 65}, "max_seqs is 65"),
        ({"num_pages": 2**31 - 1}, "num_pages"),
    ],
)
def test_options_out_of_range(plan: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Engine(plan, **options)  # type: ignore[arg-type]


def test_a_plan_for_other_machines_names_both(plan: Path, tmp_path: Path) -> None:
    whole = Reader(plan)
    target = whole.manifest["targets"][0]
    with pytest.raises(EngineError, match=f"the plan has {target}.*this host runs") as refused:
        Engine(plan, target="cpu-avx2" if target != "cpu-avx2" else "cpu-amx")
    assert refused.value.status == api.NO_TARGET


def test_entries_are_what_the_reader_sees(plan: Path) -> None:
    whole = Reader(plan)
    with Plan(plan) as opened:
        for name in whole.entries:
            assert opened.entry(name) == bytes(whole.bytes(name))
        with pytest.raises(KeyError):
            opened.entry("tsp/none")


def test_damage_is_found(plan: Path, tmp_path: Path) -> None:
    """At both ends and in the middle of every entry, and of the header: a flipped bit, and the file cut
    there."""
    whole = Reader(plan)
    data = plan.read_bytes()
    places = {0, 7, 8, whole.data // 2, whole.data - 1}
    for entry in whole.entries.values():
        places |= {entry.begin, (entry.begin + entry.end) // 2, entry.end - 1}
    damaged = tmp_path / "damaged.tsp"
    damaged.write_bytes(data)
    with damaged.open("r+b") as file:
        for place in sorted(places):
            os.pwrite(file.fileno(), bytes([data[place] ^ 1]), place)
            with pytest.raises(EngineError) as refused:
                Engine(damaged, num_pages=8)
            assert refused.value.status == api.BAD_PLAN, place
            os.pwrite(file.fileno(), data[place : place + 1], place)
    for place in sorted(places, reverse=True):
        os.truncate(damaged, place)
        with pytest.raises(EngineError) as refused:
            Plan(damaged)
        assert refused.value.status in (api.BAD_PLAN, api.IO), place


def test_a_changed_weight_is_found_though_the_file_was_verified(plan: Path, tmp_path: Path) -> None:
    """The engine remembers a verified file by device, inode, size and times."""
    copy = tmp_path / "copy.tsp"
    copy.write_bytes(plan.read_bytes())
    time.sleep(2.1)  # times of a file written just now tell nothing yet
    for _ in range(2):
        with Engine(copy, num_pages=8):
            pass
    begin = next(iter(Reader(copy).entries.values())).begin
    with copy.open("r+b") as file:
        os.pwrite(file.fileno(), bytes([copy.read_bytes()[begin] ^ 1]), begin)
    with pytest.raises(EngineError, match="is damaged"):
        Engine(copy, num_pages=8)


def test_the_engine_never_writes_to_the_plan(plan: Path) -> None:
    before = (plan.read_bytes(), plan.stat().st_mtime_ns)
    plan.chmod(0o444)
    with Engine(plan) as engine:
        engine.generate([Request([1, 2, 3])])
    assert (plan.read_bytes(), plan.stat().st_mtime_ns) == before
