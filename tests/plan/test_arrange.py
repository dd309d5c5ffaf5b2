"""arrange: buffers share memory only when they may, and the program says what the engine wants."""

import random
from pathlib import Path

import pytest
from plan_graphs import build

from tscompile import assemble
from tscompile.build import Options
from tscompile.errors import CompileError, InternalError
from tscompile.ir import Value
from tscompile.passes import arrange, pack
from tscompile.passes.arrange import Life, check, limits_of, place
from tscompile.reader import Plan

PROGRAM = {
    "abi": 2,
    "target": "cpu-avx2",
    "limits": {"max_tokens": 512, "max_seqs": 64, "max_context": 64, "page_size": 64, "vocab_size": 32},
    "arena_bytes": 512 * 32 * 4 + 512 * 96 * 4 + 512 * 32 * 2,
    "buffers": [
        {"name": "x", "offset": 196608, "bytes": 65536},
        {"name": "normed", "offset": 262144, "bytes": 32768},
        {"name": "qkv.out", "offset": 0, "bytes": 196608},
        {"name": "q", "offset": 262144, "bytes": 32768},
        {"name": "att", "offset": 0, "bytes": 65536},
        {"name": "logits", "offset": 0, "bytes": 8192},
    ],
    "kv": {"groups": [{"kind": "full"}], "layers": [0], "page_bytes": 2 * 2 * 32 * 64 * 2},
    "buckets": [
        {
            "max_tokens": 512,
            "launches": [
                {
                    "kernel": "embed_1234",
                    "op": "x",
                    "args": [{"weight": "embed", "bytes": 50 * 64}, {"buffer": 0}],
                },
                {
                    "kernel": "rms_norm_1234",
                    "op": "normed",
                    "args": [{"buffer": 0}, {"weight": "norm", "bytes": 128}, {"buffer": 1}],
                },
                {
                    "kernel": "linear_1234",
                    "op": "qkv.out",
                    "args": [{"buffer": 1}, {"weight": "qkv", "bytes": 6144}, {"buffer": 2}],
                },
                {
                    "kernel": "qkv_write_1234",
                    "op": "q",
                    "args": [{"buffer": 2}, {"weight": "table", "bytes": 4096}, {"kv": 0}, {"buffer": 3}],
                },
                {"kernel": "attention_1234", "op": "att", "args": [{"buffer": 3}, {"kv": 0}, {"buffer": 4}]},
                {"kernel": "gather_rows_1234", "op": "logits", "args": [{"buffer": 0}, {"buffer": 5}]},
            ],
            "logits": {"buffer": 5, "stride": 32},
        }
    ],
}


def arranged(folder: Path, **options: object):  # type: ignore[no-untyped-def]
    made = build(folder, **options)
    pack.run(made)
    arrange.run(made)
    return made


def test_the_program_of_a_layer(tmp_path: Path) -> None:
    made = arranged(tmp_path)
    program = made.targets["cpu-avx2"].program
    # normed and q take 64 bytes a row, x 128; qkv.out is dead when att is born
    assert program == PROGRAM
    assert made.targets["cpu-amx"].program == {**PROGRAM, "target": "cpu-amx"}


def test_random_lives_never_overlap_and_pack_well() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        lives = []
        for index in range(rng.randrange(1, 40)):
            first = rng.randrange(30)
            num_bytes = rng.choice([1, 63, 64, 65, rng.randrange(1, 100_000)])
            lives.append(Life(Value(f"v{index}", (1,), "f32"), num_bytes, first, first + rng.randrange(8)))
        arena = place(lives)
        check(lives, arena)
        alive = [sum(-(-x.num_bytes // 64) * 64 for x in lives if x.first <= t <= x.last) for t in range(40)]
        assert max(alive) <= arena <= max(2 * max(alive), 64), seed
        again = [Life(x.value, x.num_bytes, x.first, x.last) for x in lives]
        assert (place(again), [x.offset for x in again]) == (arena, [x.offset for x in lives])


def test_the_check_can_fail() -> None:
    def life(offset: int, first: int = 0, num_bytes: int = 100) -> Life:
        return Life(Value(f"v{offset}", (1,), "f32"), num_bytes, first, first, offset)

    check([life(0), life(128), life(0, first=1)], 256)
    for lives, message in [
        ([life(0), life(64)], "live together and overlap"),
        ([life(32)], "lies at 32"),
        ([life(192)], "of an arena of 256"),
        ([life(-1)], "lies at -1"),
    ]:
        with pytest.raises(InternalError, match=message):
            check(lives, 256)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": 48}, "page size 48: wanted a multiple of 32"),
        ({"page_size": 0}, "page size 0"),
        ({"max_tokens": 8}, "max_seqs 64 and max_tokens 8"),
        ({"max_seqs": 0}, "max_seqs 0"),
    ],
)
def test_limits_that_no_step_can_have(options: dict[str, int], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        limits_of(Options(Path("m.py"), Path(), **options), 64, 32)


def test_a_kernel_that_select_forgot(tmp_path: Path) -> None:
    made = build(tmp_path)
    pack.run(made)
    (bucket,) = made.targets["cpu-amx"].buckets.values()
    del bucket.symbols["att"]
    with pytest.raises(InternalError, match="select gave att no kernel for cpu-amx"):
        arrange.run(made)


def test_assembled_it_is_the_same_in_any_folder(tmp_path: Path) -> None:
    plans = []
    for folder in (tmp_path / "a", tmp_path / "some" / "where" / "else"):
        made = arranged(folder)
        made.text = {"tsp/text/tokenizer": b"tok"}
        assemble.assemble(made)
        plans.append(made.options.out.read_bytes())
        read = Plan(made.options.out)
        read.verify_weights()
        assert read.json("tsp/program/cpu-avx2") == PROGRAM
        assert read.manifest["model"]["eos_token_ids"] == [1, 2]
        assert sorted(read.manifest["producer"]["inputs"]) == ["config.json", "small.py"]
        assert list(read.entries)[:5] == ["embed", "norm", "qkv", "table", "gate_up"]
    assert plans[0] == plans[1]
    assert str(tmp_path).encode() not in plans[0]
