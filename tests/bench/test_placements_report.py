"""The report on placements: its formulas, and ours beside them where both must be the same."""

from __future__ import annotations

import placements
import pytest
from placements import SHAPES


def test_what_a_rank_receives() -> None:
    found = {kind: placements.received(kind, 800, 8) for kind in ("all_reduce", "all_gather", "all_to_all")}
    assert found == {"all_reduce": 1400, "all_gather": 700, "all_to_all": 87.5}


def test_a_dense_layer_is_megatrons() -> None:
    """Two sums, and on the wire twice as much: ours are f32."""
    builds = placements.captured("Llama-3.1-8B", 6), placements.captured("Llama-3.1-8B", 7)
    row = placements.layer_of("Llama-3.1-8B", builds, {"tp": 8}, 64)
    theirs, scattered = row["megatron"]
    assert row["collectives"] == theirs["collectives"] == {"all_reduce": 2}
    assert theirs["received_bytes"] == scattered["received_bytes"] == 2 * 2 * 7 / 8 * 64 * 4096 * 2
    assert row["received_bytes"] == 2 * theirs["received_bytes"]
    alone = placements.layer_of("Llama-3.1-8B", builds, {"dp": 8}, 8192)
    assert alone["megatron"][0]["collectives"] == {}


def test_experts_are_summed_together() -> None:
    """Shared and routed experts are added before the sum over the ranks: two sums a layer, as without."""
    builds = placements.captured("DeepSeek-V3", 6), placements.captured("DeepSeek-V3", 7)
    assert placements.layer_of("DeepSeek-V3", builds, {"tp": 8}, 64)["collectives"] == {"all_reduce": 2}
    moved = placements.layer_of("DeepSeek-V3", builds, {"dp": 8}, 8192)["collectives"]
    assert moved["ragged_all_to_all"] == 2, "rows go to their experts and back"


@pytest.mark.parametrize("mesh", placements.MESHES)
def test_megatrons_experts(mesh: dict[str, int]) -> None:
    gathered, sent = placements.megatron(SHAPES["DeepSeek-V3"], mesh, 64)
    assert sent["collectives"]["all_to_all"] == 2
    assert gathered["received_bytes"] > sent["received_bytes"], "8 experts a token on 8 ranks"
