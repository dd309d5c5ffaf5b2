"""How fast single kernels are: python tests/kernels/measure.py [TARGET ...]. Shapes of Qwen3-0.6B, for
experts of Qwen3-30B-A3B, for latent attention of DeepSeek-V3, bf16. Prints the best of several runs, with one
thread and with all cores: GFLOP/s and GB/s of weights (linear, experts) or of KV cache (attention). Compare
with the peaks of the same minutes, which `make bench` measures."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import kernel_arrays as arrays
import numpy as np
from kernel_harness import Buffer, arguments_of

from tscompile.kernels import build as kernels
from tscompile.kernels.desc import Attention, Experts, KernelDesc, LatentAttention, Linear, args_of
from tscompile.kernels.emit import emit, headers
from tscompile.kernels.host import host_targets
from tscompile.kernels.select import choose
from tscompile.kernels.target import TARGETS, Target

LINEAR, ATTENTION = args_of("x", "weight:weight", "out!"), args_of("q", "kv:kv", "out!")
UP = args_of("x", "order", "counts", "weight:weight", "out!")
DOWN = args_of("x", "counts", "weight:weight", "order", "weights", "out!")
HEADS, KV_HEADS, HEAD_DIM, PAGE = 16, 8, 128, 64


def bf16(*shape: int) -> Buffer:
    return Buffer(shape, np.uint16, 0x3C00)  # 2^-7 everywhere: fast to fill, no denormals


def linears() -> Iterator[tuple[str, KernelDesc, dict[str, np.ndarray], dict[str, Buffer], int, int]]:
    """(name, kernel, batch, arguments, floating-point operations, bytes that must be read)"""
    for k, n in ((1024, 65536), (3072, 16384)):  # weights well beyond the caches
        weight = bf16(n * k)
        for rows in (1, 4, 16, 256):
            made = Linear(LINEAR, "T", False, 1, k, n, "bf16", 0, 0, "f32")
            arguments = {"x": bf16(rows, k), "weight": weight, "out": Buffer((rows, n), np.float32)}
            batch = {"positions": np.zeros(rows)}
            yield f"linear {rows} x {k} x {n}", made, batch, arguments, 2 * rows * k * n, 2 * k * n


def experts() -> Iterator[tuple[str, KernelDesc, dict[str, np.ndarray], dict[str, Buffer], int, int]]:
    """Of a layer of Qwen3-30B-A3B: 8 of 128 experts, 2048 x 768."""
    num_experts, top, hidden, inner = 128, 8, 2048, 768
    random = np.random.default_rng(0)
    up = Experts(UP, top, num_experts, hidden, 2 * inner, "bf16", True, inner, False, "bf16")
    down = Experts(DOWN, top, num_experts, inner, hidden, "bf16", False, 0, True, "f32")
    weights = {made.k: bf16(num_experts * made.n * made.k) for made in (up, down)}
    for rows in (1, 8, 512):
        ids = np.stack([random.permutation(num_experts)[:top] for _ in range(rows)]).reshape(-1)
        counts = np.bincount(ids, minlength=num_experts)
        shared = {
            "order": Buffer(ids.shape, np.int32, np.argsort(ids, kind="stable")),
            "counts": Buffer((num_experts,), np.int32, counts),
            "weights": Buffer(ids.shape, np.float32, 0.125),
        }
        outs = (bf16(len(ids), inner), Buffer((rows, hidden), np.float32))
        for name, made, x, out in (
            ("up", up, bf16(rows, hidden), outs[0]),
            ("down", down, bf16(len(ids), inner), outs[1]),
        ):
            arguments = {**shared, "x": x, "weight": weights[made.k], "out": out}
            batch, size = {"positions": np.zeros(rows)}, made.n * made.k
            read = 2 * int((counts > 0).sum()) * size
            yield f"experts {name}, {rows} tokens", made, batch, arguments, 2 * len(ids) * size, read


def attentions() -> Iterator[tuple[str, KernelDesc, dict[str, np.ndarray], dict[str, Buffer], int, int]]:
    made = Attention(ATTENTION, HEADS, KV_HEADS, HEAD_DIM, "bf16", PAGE, HEAD_DIM**-0.5, 0, "bf16")
    for new, length in ((1, 4096), (256, 256), (256, 2048)):
        pages = -(-length // PAGE)
        batch = arrays.batch_of([arrays.Request(length, new)], PAGE, [list(range(pages))])
        kv = bf16(pages, KV_HEADS, 2 * HEAD_DIM * PAGE)
        arguments = {"q": bf16(new, HEADS, HEAD_DIM), "kv": kv, "out": bf16(new, HEADS, HEAD_DIM)}
        seen = int((batch["positions"] + 1).sum())
        cost = 4 * HEADS * HEAD_DIM * seen
        yield f"attention {new} of {length}", made, batch, arguments, cost, kv.array.nbytes


def latents() -> Iterator[tuple[str, KernelDesc, dict[str, np.ndarray], dict[str, Buffer], int, int]]:
    """DeepSeek-V3's heads, all of them and those of one rank of eight."""
    rank, row = 512, 576
    for heads in (16, 128):
        made = LatentAttention(ATTENTION, heads, row, rank, "bf16", PAGE, row**-0.5, "bf16")
        for new, length in ((1, 4096), (128, 2048)):
            pages = -(-length // PAGE)
            batch = arrays.batch_of([arrays.Request(length, new)], PAGE, [list(range(pages))])
            kv = bf16(pages, row * PAGE)
            arguments = {"q": bf16(new, heads, row), "kv": kv, "out": bf16(new, heads, rank)}
            cost = 2 * heads * (row + rank) * int((batch["positions"] + 1).sum())
            yield f"latent {heads} heads, {new} of {length}", made, batch, arguments, cost, kv.array.nbytes


def compiled(made: KernelDesc, target: Target) -> Any:
    """The kernel, as a plan would hold it."""
    source = {made.symbol: emit(made, choose(made, target), target)}
    compiler, cache = kernels.find_compiler(), kernels.cache_folder()
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(kernels.build(source, headers(), target.flags, compiler=compiler, cache=cache))
        file.flush()
        return getattr(ctypes.CDLL(file.name), made.symbol)


def fastest(kernel: Any, args: ctypes.Structure, threads: int) -> float:
    """Seconds of the best of several runs."""
    times = []
    for _ in range(7):
        call = [(ctypes.byref(args), thread, threads) for thread in range(threads)]
        others = [threading.Thread(target=kernel, args=arguments) for arguments in call[1:]]
        start = time.perf_counter()
        for other in others:
            other.start()
        kernel(*call[0])
        for other in others:
            other.join()
        times.append(time.perf_counter() - start)
    return min(times)


def main(targets: list[str]) -> None:
    cores = len(os.sched_getaffinity(0))
    for name in targets or host_targets():
        for text, made, batch, arguments, flops, num_bytes in itertools.chain(
            linears(), experts(), attentions(), latents()
        ):
            kernel = compiled(made, TARGETS[name])
            args, _kept = arguments_of(made, batch, arguments)
            for threads in sorted({1, cores}):
                seconds = fastest(kernel, args, threads)
                figures = f"{flops / seconds / 1e9:7.1f} GFLOP/s {num_bytes / seconds / 1e9:6.1f} GB/s"
                print(f"{name:10} {text:30} {threads} threads {seconds * 1e3:8.2f} ms {figures}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
