"""Which of the ways to compute a kernel is taken: the best that fits, or what a lockfile says, replayed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import plans
import pytest
from checkpoints import Spec
from kernels_of_models import linear

from tscompile.errors import CompileError
from tscompile.inspect import inspect, inspect_text
from tscompile.kernels import desc
from tscompile.kernels.gpu.lockfile import Entry, Lockfile, bucket_of, text_of
from tscompile.kernels.gpu.select import choose, decide, offered
from tscompile.kernels.gpu.spec import Rows
from tscompile.kernels.gpu.target import GPU_TARGETS
from tscompile.reader import Plan

TARGET = GPU_TARGETS["sm_90a"]
ROWS = Rows(64, 64)
PRODUCT = linear(4096, 4096)
SPEC = Spec("qwen3", {"vocab_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32})


def entry(config: str, made: desc.KernelDesc = PRODUCT, rows: Rows = ROWS, us: float = 12.5) -> Entry:
    return Entry(TARGET.name, made.text, bucket_of(made, rows), config, us, "NVIDIA H200", "2026-11-22")


def written(folder: Path, *entries: Entry) -> Path:
    path = folder / "kernels.lock"
    path.write_text(text_of(entries))
    return path


def test_the_first_that_fits_is_taken() -> None:
    """And what would have been better, but does not fit, is told."""
    ways = offered(PRODUCT, TARGET, ROWS)
    assert len({way.config for way in ways}) == len(ways)
    taken = decide(PRODUCT, TARGET, ROWS, None)
    fitting = [way for way in ways if way.operand_bytes <= TARGET.tile_bytes]
    assert taken.step == fitting[0].step == choose(PRODUCT, TARGET, ROWS)
    small = replace(TARGET, tile_bytes=fitting[0].operand_bytes - 1)
    chosen = decide(PRODUCT, small, ROWS, None)
    assert chosen.config not in (taken.config, "")
    (why,) = {text for text in chosen.why.split("; ") if text.startswith(f"not {taken.config}: ")}
    assert why.endswith(
        f"its operands take {fitting[0].operand_bytes} bytes of shared memory, sm_90a has "
        f"{small.tile_bytes} for them"
    )
    with pytest.raises(CompileError, match=r"no kernel for linear args=.* fits: its operands take \d+ bytes"):
        decide(PRODUCT, replace(TARGET, tile_bytes=1), ROWS, None)


def test_the_lockfile_comes_first(tmp_path: Path) -> None:
    ways = [way for way in offered(PRODUCT, TARGET, ROWS) if way.operand_bytes <= TARGET.tile_bytes]
    lock = Lockfile.read(written(tmp_path, entry(ways[3].config)))
    chosen = decide(PRODUCT, TARGET, ROWS, lock)
    assert (chosen.step, chosen.config) == (ways[3].step, ways[3].config)
    assert chosen.why == "12.5 us on NVIDIA H200, 2026-11-22, says the lockfile"
    for other in (
        decide(PRODUCT, TARGET, Rows(32, 32), lock),
        decide(PRODUCT, GPU_TARGETS["sm_100a"], ROWS, lock),
        decide(linear(4096, 2048), TARGET, ROWS, lock),
    ):
        assert "lockfile" not in other.why
    assert len(lock.used) == 1


def test_what_is_not_offered_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, entry("linear rows=7 warps=4 stages=9"))
    with pytest.raises(
        CompileError,
        match=r"kernels.lock:2: sm_90a computes no linear by 'linear rows=7 warps=4 stages=9': there is no "
        r"such kernel. It can by 'linear rows=.*: measure again, or leave the line out",
    ):
        decide(PRODUCT, TARGET, ROWS, Lockfile.read(path))
    many = Rows(512, 64)
    deep = next(way for way in offered(PRODUCT, TARGET, many) if way.operand_bytes > TARGET.tile_bytes)
    with pytest.raises(
        CompileError, match=r"its operands take \d+ bytes of shared memory, sm_90a has 163840"
    ):
        decide(PRODUCT, TARGET, many, Lockfile.read(written(tmp_path, entry(deep.config, rows=many))))


def test_the_text(tmp_path: Path) -> None:
    """Sorted, the last of equal keys, and read back as it was."""
    some = [entry("b", rows=Rows(8, 8)), entry("a"), entry("c", linear(64, 64)), entry("d", us=3)]
    path = written(tmp_path, *some)
    read = Lockfile.read(path)
    assert [e for _, e in read.entries.values()] == [some[2], some[3], some[0]]
    assert text_of(reversed([e for _, e in read.entries.values()])) == path.read_text()
    attention = desc.Attention(desc.args_of("q", "kv:kv", "out!"), 2, 1, 64, "bf16", 64, 1.0, 0, "bf16")
    assert bucket_of(attention, Rows(8, 4)) == "T=8 S=4"
    assert bucket_of(linear(64, 64, gather=True), Rows(8, 4)) == "L=4"


def test_what_is_no_lockfile(tmp_path: Path) -> None:
    good: dict[str, Any] = json.loads(text_of([entry("a")]).splitlines()[1])
    path = tmp_path / "kernels.lock"
    cases: list[tuple[str, str]] = [
        ("not json", r"kernels.lock:1: no JSON; wanted a JSON object with bucket, config, .*, target, us"),
        ("[1]", ":1: no object"),
        (json.dumps({**good, "more": 1}), ":1: has bucket, config, date, device, kernel, more, target, us"),
        (json.dumps({**good, "us": 0}), ":1: a value of another kind: us is a positive number"),
        (json.dumps({**good, "us": True}), "a value of another kind"),
        (json.dumps({**good, "us": 1e999}), "a value of another kind"),
        (json.dumps({**good, "config": 7}), "the rest are texts"),
        (
            f"# a comment\n\n{json.dumps(good)}\n{json.dumps(good)}",
            r":4: line 3 has an entry for this target",
        ),
    ]
    for text, said in cases:
        path.write_text(text)
        with pytest.raises(CompileError, match=said):
            Lockfile.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CompileError, match="is not text: it is no lockfile"):
        Lockfile.read(path)
    with pytest.raises(CompileError, match=r"--kernels-lock .*missing: No such file or directory"):
        Lockfile.read(tmp_path / "missing")


def test_a_build_replays_it(tmp_path: Path) -> None:
    """The kernel that it names is in the plan, which says so; the same lockfile, the same bytes."""
    checkpoints.make(SPEC, tmp_path / "checkpoint")
    limits = {"max_tokens": 1, "max_seqs": 1, "page_size": 32}

    def build(name: str, **options: Any) -> Path:
        return plans.build(
            tmp_path / "checkpoint", tmp_path / name, "bf16", (TARGET.name,), **limits, **options
        )

    def kernels(path: Path) -> dict[str, str]:
        (bucket,) = Plan(path).json("tsp/program/sm_90a")["buckets"]
        return {launch["op"]: launch["kernel"] for launch in bucket["launches"]}

    plain = build("plain.tsp")
    steps = Plan(plain).json("tsp/roofline")["sm_90a"]["buckets"][0]["steps"]
    assert {step["op"] for step in steps} >= {"layers.*.self_attn.qkv"}
    made, rows = linear(128, 64), Rows(1, 1)  # (2 + 2 * 1) heads of 32, of hidden 64
    ways = offered(made, TARGET, rows)
    lock = written(tmp_path, entry(ways[1].config, made, rows), entry("elsewhere", linear(8, 8), rows))
    first, again = build("first.tsp", kernels_lock=lock), build("again.tsp", kernels_lock=lock)
    assert first.read_bytes() == again.read_bytes()
    before, after = kernels(plain), kernels(first)
    changed = {op for op in before if before[op] != after[op]}
    assert changed == {"layers.0.self_attn.qkv", "layers.1.self_attn.qkv"}
    assert after["layers.0.self_attn.qkv"] == ways[1].step.launches[0].kernel.symbol
    (receipt,) = (r for r in Plan(first).json("tsp/receipts") if r["pattern"] == "kernel")
    assert receipt["where"] == "sm_90a, steps of up to 1 tokens: layers.*.self_attn.qkv"
    assert receipt["reason"] == f"{ways[1].config}: 12.5 us on NVIDIA H200, 2026-11-22, says the lockfile"
    assert receipt["reason"] in inspect_text(inspect(first))
    assert "kernels.lock" in Plan(first).manifest["producer"]["inputs"]
