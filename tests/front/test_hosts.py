"""Ranks on two hosts, over MPI: the tokens are those of one rank, and what becomes of them when one dies or
does not come."""

import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from front_server import Server
from two_hosts import TwoHosts

PROMPT = [312, 285, 707, 949, 1711]
LONG = [(37 * i + 11) % 2000 for i in range(300)]  # all_reduces in two steps


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    try:
        two = TwoHosts(tmp_path_factory.mktemp("hosts"))
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        why = getattr(error, "stderr", None) or str(error)
        pytest.skip(f"no network namespaces can be made here: {why}")
    yield two
    two.close()


def tokens(server: Server) -> list[str]:
    answer = server.complete([PROMPT, LONG], max_tokens=24, ignore_eos=True, logprobs=0)
    return [token for choice in answer["choices"] for token in choice["logprobs"]["tokens"]]


@pytest.fixture
def serve(executable: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(program: Path, plan: Path, *arguments: str) -> Server:
        servers.append(Server(program, plan, tmp_path / f"{len(servers)}.log", *arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"tp": 4}, {"dp": 2}, {"pp": 2}, {"cp": 2}])
def test_tokens_are_those_of_one_rank(
    executable: Path,
    hosts: TwoHosts,
    plans: Callable[..., Path],
    serve: Callable[..., Server],
    mesh: dict[str, int],
) -> None:
    wanted = tokens(serve(executable, plans()))
    ranks = math.prod(mesh.values())
    with hosts.inside(0):
        server = serve(hosts.launcher(f"run{ranks}", executable, ranks), plans(**mesh))
        assert [len(hosts.processes(host, executable)) for host in (0, 1)] == [ranks // 2] * 2
        assert [tokens(server) for _ in range(2)] == [wanted] * 2
    assert (
        f"{ranks} ranks on several hosts, {ranks // 2} of them on this one, over MPI"
        in server.log.read_text()
    )
    with_sockets = [pid for pid in hosts.processes(0, executable) if listens(pid, server.port)]
    assert len(with_sockets) == 1  # rank 0 alone serves
    os.kill(with_sockets[0], signal.SIGTERM)
    assert server.process.wait(30) == 0, server.log.read_text()


def listens(pid: int, port: int) -> bool:
    sockets = set()
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if int(words[1].split(":")[1], 16) == port and words[3] == "0A":
            sockets.add(f"socket:[{words[9]}]")
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(fd) in sockets:
                return True
    return False


def test_a_killed_rank_is_named(
    executable: Path, hosts: TwoHosts, plans: Callable[..., Path], serve: Callable[..., Server]
) -> None:
    program = hosts.launcher("keep", executable, 2, "-disable-auto-cleanup")
    with hosts.inside(0):
        server = serve(program, plans(tp=2))
        with server.open_stream({"prompt": PROMPT, "max_tokens": 1500, "logprobs": 0}) as stream:
            data = b""
            while b"data:" not in data:
                data += stream.recv(4096)
            (killed,) = hosts.processes(1, executable)
            os.kill(killed, signal.SIGKILL)
            while more := stream.recv(65536):
                data += more
    died = f"rank 1 (process {killed} on {hosts.names[1]}) died"
    status = server.process.wait(30)
    told = f"status {status}: {data[-500:]!r}\n{server.log.read_text()}"
    assert re.search(rb'"error".*' + re.escape(died.encode()), data), told
    assert status != 0
    assert f"tsruntime: {died}" in told
    assert hosts.processes(0, executable) == []


def test_a_rank_that_does_not_come_is_named(
    executable: Path, hosts: TwoHosts, plans: Callable[..., Path]
) -> None:
    other = hosts.folder / "sleeps"
    other.write_text(f'#!/bin/sh\n[ "$PMI_RANK" = 1 ] && exec sleep 60\nexec {executable} "$@"\n')
    other.chmod(0o755)
    program = hosts.launcher("late", other, 2)
    words = [str(program), "generate", str(plans(tp=2)), "--ids", "1,2", "--rank-timeout", "1"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = [process.stderr.readline() for _ in range(2)]
        assert "waited 1 s for the others to start MPI, and rank 1 did not" in said[1]
        hosts.wait_until_gone(0, executable)
        process.kill()  # mpiexec waits for the other command


def test_without_a_library_the_error_says_what_to_do(
    executable: Path, hosts: TwoHosts, plans: Callable[..., Path]
) -> None:
    place = {
        "PMI_RANK": "0",
        "PMI_SIZE": "2",
        "MPI_LOCALNRANKS": "1",
        "TSRUNTIME_MPI": "/nowhere/libmpi_abi.so",
    }
    words = [str(executable), "generate", str(plans(tp=2)), "--ids", "1,2"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | place)
    assert done.returncode == 1
    for text in (
        "several hosts",
        "pip install mpich",
        "TSRUNTIME_MPI",
        "/nowhere/libmpi_abi.so: cannot open",
    ):
        assert text in done.stderr
    place["TSRUNTIME_MPI"] = f"{sys.prefix}/lib/libmpi_abi.so.1"
    del place["PMI_RANK"], place["PMI_SIZE"]
    place |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | place)
    assert done.returncode == 1
    assert "the launcher says rank 0 of 2, but the MPI library says 0 of 1" in done.stderr


@pytest.mark.parametrize("fault", ["stopped", "cut off"])
def test_a_rank_that_is_silent_is_named(
    executable: Path, hosts: TwoHosts, plans: Callable[..., Path], serve: Callable[..., Server], fault: str
) -> None:
    program = hosts.launcher("silent", executable, 2, "-disable-auto-cleanup")
    with hosts.inside(0):
        server = serve(program, plans(tp=2), "--rank-timeout", "5")
        with server.open_stream({"prompt": PROMPT, "max_tokens": 1500, "logprobs": 0}) as stream:
            data = b""
            while b"data:" not in data:
                data += stream.recv(4096)
            (silent,) = hosts.processes(1, executable)
            if fault == "stopped":
                os.kill(silent, signal.SIGSTOP)
            else:
                hosts.cable("down")
            try:
                while more := stream.recv(65536):
                    data += more
                hosts.wait_until_gone(0, executable)
                if fault == "cut off":  # says the same of rank 0, and ends
                    hosts.wait_until_gone(1, executable)
            finally:
                if fault == "stopped":
                    os.kill(silent, signal.SIGKILL)
                hosts.cable("up")
    said = f"rank 1 (process {silent} on {hosts.names[1]}) has not moved for 5 s"
    assert re.search(rb'"error".*' + re.escape(said.encode()), data), (
        f"{data[-500:]!r}\n{server.log.read_text()}"
    )
    assert f"tsruntime: {said}" in server.log.read_text()
