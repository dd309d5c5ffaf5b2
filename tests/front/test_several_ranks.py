"""Plans of several ranks: as many processes that serve as one, and what becomes of them when one dies."""

import json
import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from front_server import Server

PROMPT = [312, 285, 707, 949, 1711]


def generate(executable: Path, plan: Path, *arguments: str, **environment: str) -> list[str]:
    words = [
        str(executable),
        "generate",
        str(plan),
        "--ids",
        ",".join(map(str, PROMPT)),
        "--max-tokens",
        "24",
        "--ignore-eos",
        "--json",
    ]
    done = subprocess.run(
        [*words, *arguments], capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)["ids"]  # type: ignore[no-any-return]


def children(pid: int) -> list[int]:
    """Ranks 1, 2, ... that the process has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread or a child that just ended
            for child in (task / "children").read_text().split():
                words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
                rank = [word for word in words if word.startswith(b"--rank=")]
                found += [(int(rank[0].removeprefix(b"--rank=")), int(child))] if rank else []
    return [pid for _, pid in sorted(found)]


def gone(pid: int, timeout_s: float = 10.0) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            if ") Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):  # ended before the open, or before the read
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def serve(executable: Path, plans: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(**mesh: int) -> Server:
        servers.append(Server(executable, plans(**mesh), tmp_path / f"{len(servers)}.log"))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"tp": 4}, {"dp": 2}, {"dp": 2, "tp": 2}, {"cp": 2, "pp": 2}])
def test_the_tokens_are_those_of_one_rank(
    executable: Path, plans: Callable[..., Path], serve: Callable[..., Server], mesh: dict[str, int]
) -> None:
    wanted = generate(executable, plans())
    assert generate(executable, plans(**mesh)) == wanted
    assert generate(executable, plans(**mesh), "--threads", "2") == wanted
    server = serve(**mesh)
    pids = children(server.process.pid)
    assert len(pids) == math.prod(mesh.values()) - 1
    one = serve()
    fields = {"max_tokens": 24, "ignore_eos": True, "logprobs": 0}
    tokens = one.complete(PROMPT, **fields)["choices"][0]["logprobs"]["tokens"]
    assert tokens == [f"token_id:{token}" for token in wanted]
    choices = [choice for _ in range(2) for choice in server.complete([PROMPT] * 3, **fields)["choices"]]
    assert [choice["logprobs"]["tokens"] for choice in choices] == [tokens] * 6
    assert server.stop() == 0
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize("launcher", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_a_launcher_starts_the_ranks(
    executable: Path, plans: Callable[..., Path], tmp_path: Path, launcher: tuple[str, str]
) -> None:
    rank, size = launcher
    job = {"MASTER_ADDR": "host", "MASTER_PORT": tmp_path.name, "SLURM_JOB_ID": tmp_path.name}
    places = [os.environ | job | {rank: str(r), size: "2"} for r in range(2)]
    words = [
        str(executable),
        "generate",
        str(plans(tp=2)),
        "--ids",
        ",".join(map(str, PROMPT)),
        "--max-tokens",
        "4",
        "--json",
    ]
    ranks = [
        subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for env in places[::-1]
    ]
    out = [process.communicate(timeout=60) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], out
    assert out[0] == (b"", b"")  # rank 1 serves nobody
    assert len(json.loads(out[1][0])["ids"]) == 4
    wrong = subprocess.run(words, env=places[0] | {size: "3"}, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert f"the plan is for 2 ranks, but {size} says 3" in wrong.stderr


def test_a_killed_rank_ends_the_server(serve: Callable[..., Server]) -> None:
    server = serve(tp=2)
    (child,) = children(server.process.pid)
    with server.open_stream({"prompt": PROMPT, "max_tokens": 1500, "logprobs": 0}) as stream:
        data = stream.recv(4096)
        while b"data:" not in data:
            data += stream.recv(4096)
        os.kill(child, signal.SIGKILL)
        while more := stream.recv(65536):
            data += more
    died = f"rank 1 (process {child}) died"
    assert re.search(rb'"error".*' + re.escape(died.encode()), data), data[-500:]
    assert server.process.wait(10) == 1
    assert f"tsruntime: {died}: signal: 9 (SIGKILL)" in server.log.read_text()


def test_a_killed_rank_ends_an_idle_server(serve: Callable[..., Server]) -> None:
    server = serve(tp=4)
    pids = children(server.process.pid)
    os.kill(pids[1], signal.SIGKILL)
    assert server.process.wait(10) == 1
    assert f"rank 2 (process {pids[1]}) died" in server.log.read_text()
    assert all(gone(pid) for pid in pids)


def test_ranks_die_with_rank_0(serve: Callable[..., Server]) -> None:
    server = serve(tp=2)
    pids = children(server.process.pid)
    server.process.kill()
    assert all(gone(pid) for pid in pids)


def command(executable: Path, plan: Path, rank_timeout: str) -> list[str]:
    ids = ",".join(map(str, PROMPT))
    return [str(executable), "generate", str(plan), "--ids", ids, "--rank-timeout", rank_timeout]


def test_a_stopped_rank_is_named_at_start(executable: Path, plans: Callable[..., Path]) -> None:
    words = command(executable, plans(tp=2), rank_timeout="2")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (pids := children(process.pid)):
        assert process.poll() is None
    os.kill(pids[0], signal.SIGSTOP)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert f"rank 1 (process {pids[0]})" in errors
    assert gone(pids[0])


def test_a_rank_that_does_not_come_is_named(executable: Path, plans: Callable[..., Path]) -> None:
    words = command(executable, plans(tp=4), rank_timeout="0.5")
    place = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_PORT": str(os.getpid())}
    done = subprocess.run(words, env=os.environ | place, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "not all of 4 ranks came within 0.500 s: missing is rank 1, rank 2, rank 3" in done.stderr
    place["RANK"] = "3"
    done = subprocess.run(words, env=os.environ | place, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "rank 0 did not come within 0.500 s" in done.stderr
