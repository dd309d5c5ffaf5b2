"""Measures collectives between ranks of one host, ours beside Gloo's and MPI's, and writes a dated report
into artifacts/bench. `make bench-collectives` runs it; it ends by printing the report as one line of JSON.

Two ranks of one thread each, on at least two cores, of f32. In each round every library reduces the same
values, one after the other, in the same two processes: so what disturbs one disturbs all. Ours is
csrc/collective over csrc/shared_group, as a program runs it; Gloo is torch.distributed's; MPI is the library
that mpirun comes with, by its standard ABI.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reports
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "build" / "release" / "tests" / "libcollective_bench.so"
RANKS = 2
SIZES = tuple(4**power for power in range(6, 14))  # bytes of the whole value: 4 KiB to 64 MiB
KINDS = ("all_reduce", "reduce_scatter", "all_gather")

# MPI 5.0, appendix A: handles of the standard ABI
COMM_WORLD, FLOAT, SUM = (ctypes.c_void_p(value) for value in (0x101, 0x210, 0x21))

Run = Callable[[int], float]  # collectives on end -> seconds of one


class Ours:
    """The engine's, over shared memory."""

    def __init__(self, rank: int, folder: Path) -> None:
        lib = ctypes.CDLL(str(LIBRARY))
        lib.rank_open.restype = ctypes.c_void_p
        lib.rank_open.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.c_int64, ctypes.c_int32]
        lib.rank_fd.argtypes = [ctypes.c_void_p]
        lib.rank_collective.restype = ctypes.c_double
        lib.rank_collective.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int32,
        ]
        self.lib, room, told = lib, 2 * max(SIZES), folder / "memory"
        if rank == 0:
            self.handle = lib.rank_open(RANKS, rank, room, -1)
            told.with_suffix(".new").write_text(f"/proc/{os.getpid()}/fd/{lib.rank_fd(self.handle)}")
            told.with_suffix(".new").rename(told)
        else:
            while not told.exists():
                time.sleep(0.01)
            self.handle = lib.rank_open(RANKS, rank, room, os.open(told.read_text(), os.O_RDWR))

    def collective(self, kind: str, given: torch.Tensor, out: torch.Tensor, elements: int) -> Run:
        def run(times: int) -> float:
            return float(
                self.lib.rank_collective(
                    self.handle, KINDS.index(kind), given.data_ptr(), out.data_ptr(), elements, times
                )
            )

        return run


def timed(one: Callable[[], None]) -> Run:
    def run(times: int) -> float:
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(times):
            one()
        return (time.perf_counter() - begin) / times

    return run


def libraries(ours: Ours, mpi: ctypes.CDLL, elements: int, rank: int) -> dict[str, Run]:
    """What is measured of a value of that many elements, each checked first."""
    given = torch.full((elements,), float(rank + 1))
    out = torch.zeros(elements)
    own = torch.empty(elements // RANKS)

    def gloo() -> None:
        dist.all_reduce(out)

    def by_mpi() -> None:
        pointers = (ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        if mpi.MPI_Allreduce(*pointers, ctypes.c_int(elements), FLOAT, SUM, COMM_WORLD) != 0:
            raise RuntimeError("MPI_Allreduce failed")

    runs = {
        "all_reduce": ours.collective("all_reduce", given, out, elements),
        "all_reduce, MPI": timed(by_mpi),
        "all_reduce, Gloo": timed(gloo),
        "reduce_scatter": ours.collective("reduce_scatter", given, own, elements),
        "all_gather": ours.collective("all_gather", given, out, elements),
    }
    for name, run in runs.items():
        out.copy_(given)  # Gloo's is in place
        own.zero_()
        run(1)
        found = own if name == "reduce_scatter" else out
        wanted = (1.0, 2.0) if name == "all_gather" else (3.0, 3.0)
        if (float(found[0]), float(found[-1])) != wanted:
            raise RuntimeError(f"{name} of {elements} elements gave {found[0]} and {found[-1]}, not {wanted}")
    return runs


def rank_main(folder: Path, quick: bool) -> None:
    """One rank, under mpirun. Rank 0 writes what it measured."""
    mpi = ctypes.CDLL("libmpi_abi.so.1", mode=ctypes.RTLD_GLOBAL)
    mpi.MPI_Init(None, None)
    number = ctypes.c_int()
    mpi.MPI_Comm_rank(COMM_WORLD, ctypes.byref(number))
    rank = number.value
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    ours, rows = Ours(rank, folder), []
    for num_bytes in SIZES[:2] if quick else SIZES:
        runs = libraries(ours, mpi, num_bytes // 4, rank)
        # Gloo adds in place: of ones and twos that grow, which no time depends on
        times = max(2, min(200, 2**22 // num_bytes))
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds_of(quick)):
            for name, run in runs.items():
                seconds[name].append(run(times))
        rows.append(
            {
                "bytes": num_bytes,
                "us": {name: round(statistics.median(found) * 1e6, 2) for name, found in seconds.items()},
                "least_us": {name: round(min(found) * 1e6, 2) for name, found in seconds.items()},
            }
        )
        if rank == 0:
            print(f"collectives: {num_bytes:,} bytes: {rows[-1]['us']}", file=sys.stderr, flush=True)
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    mpi.MPI_Finalize()


def rounds_of(quick: bool) -> int:
    return 2 if quick else 15


def markdown(report: dict[str, Any]) -> str:
    names = list(report["rows"][0]["us"])
    lines = [
        f"# {report['date']}, collectives between {RANKS} ranks of one host",
        "",
        f"{report['cpu']}, a thread a rank, of f32. The median of {report['rounds']} rounds, and the least, "
        "in microseconds; in brackets the value's bytes by the median, in GB/s. Ours, but where named.",
        "",
        f"| bytes of the value | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for row in report["rows"]:
        cells = []
        for name in names:
            us, least = row["us"][name], row["least_us"][name]
            cells.append(f"{us:,.1f}, {least:,.1f} ({row['bytes'] / us / 1e3:.1f})")
        lines.append(f"| {row['bytes']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small values, twice: to try the bench itself")
    parser.add_argument(
        "--out", type=Path, default=reports.FOLDER, metavar="DIR", help="default: artifacts/bench"
    )
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_in:
        rank_main(arguments.rank_in, arguments.quick)
        return
    if not LIBRARY.exists():
        sys.exit(f"collectives.py: {LIBRARY.relative_to(ROOT)} is missing: make engine")
    if len(os.sched_getaffinity(0)) < RANKS and not arguments.quick:
        sys.exit(f"collectives.py: {RANKS} ranks need a core each, and this process may use fewer")
    here = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as folder:
        again = [sys.executable, __file__, "--rank-in", folder, *(["--quick"] if arguments.quick else [])]
        libraries = f"{here.parent / 'lib'}:{os.environ.get('LD_LIBRARY_PATH', '')}"
        subprocess.run(
            [here / "mpirun", "-n", str(RANKS), *again],
            check=True,
            env={**os.environ, "LD_LIBRARY_PATH": libraries},
        )
        rows = json.loads(Path(folder, "rows.json").read_text())
    date = datetime.date.today().isoformat()
    report = {
        "date": date,
        "cpu": reports.processor(),
        "ranks": RANKS,
        "rounds": rounds_of(arguments.quick),
        "rows": rows,
    }
    reports.keep(report, markdown(report), "collectives", arguments.out)
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
