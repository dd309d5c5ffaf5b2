"""Two hosts on one machine: network namespaces with names of their own, joined by a cable, and mpiexec over
both."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BIN = Path(sys.executable).parent
CLONE_NEWNET = 0x40000000
ADDRESSES = ("10.99.0.1", "10.99.0.2")

# What mpiexec calls instead of ssh: options, a host's address, and the command.
ENTER = """#!/bin/sh
[ "$1" = -x ] && shift
case $1 in {address}) name={names[0]};; *) name={names[1]};; esac
shift
exec ip netns exec $name unshare --uts --ipc sh -c "hostname $name; exec $*"
"""


def ip(*words: str) -> str:
    """Raises CalledProcessError."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class TwoHosts:
    """Network, host name and System V memory are a host's own; files and processes are shared."""

    def __init__(self, folder: Path) -> None:
        """Raises CalledProcessError or FileNotFoundError where there can be no namespaces."""
        self.names = tuple(f"ts{os.getpid()}{end}" for end in "ab")
        self.enter, self.folder = folder / "enter.sh", folder
        self.enter.write_text(ENTER.format(address=ADDRESSES[0], names=self.names))
        self.enter.chmod(0o755)
        try:
            self._connect()
            self.command(0, "true")
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ends = [
            "eth0",
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            self.names[1],
        ]
        ip("link", "add", *ends)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        self.cable("up")

    def cable(self, state: str) -> None:
        """Plugged in ("up") or pulled out ("down") at both ends."""
        for name in self.names:
            ip("-n", name, "link", "set", "eth0", state)
        for name in self.names:
            while f"state {state.upper()}" not in ip("-n", name, "link", "show", "eth0"):
                time.sleep(0.01)

    def command(self, host: int, *words: str) -> None:
        subprocess.run([str(self.enter), ADDRESSES[host], *words], check=True, capture_output=True)

    def launcher(self, name: str, executable: Path, ranks: int, *options: str) -> Path:
        """A program that is the executable, started as so many ranks, half of them on each host."""
        words = [
            BIN / "mpiexec",
            "-launcher",
            "ssh",
            "-launcher-exec",
            self.enter,
            "-iface",
            "eth0",
            "-hosts",
        ]
        words += [",".join(ADDRESSES), "-ppn", ranks // 2, *options, "-n", ranks, executable]
        path = self.folder / name
        environment = f"UCX_NET_DEVICES=eth0 TSRUNTIME_MPI={sys.prefix}/lib/libmpi_abi.so.1"
        script = (
            f'#!/bin/sh\n{environment} exec {self.enter} {ADDRESSES[0]} {" ".join(map(str, words))} "$@"\n'
        )
        path.write_text(script)
        path.chmod(0o755)
        return path

    def processes(self, host: int, executable: Path) -> list[int]:
        """Those of the executable that run on the host."""
        found = []
        for pid in ip("netns", "pids", self.names[host]).split():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):  # ended between two calls, or in the read
                continue
            found += [int(pid)] if words[0] == bytes(executable) else []
        return found

    def wait_until_gone(self, host: int, executable: Path, timeout_s: float = 30.0) -> None:
        """Until none of the executable's processes runs on the host."""
        deadline = time.monotonic() + timeout_s
        while found := self.processes(host, executable):
            assert time.monotonic() < deadline, f"{found} should have ended"
            time.sleep(0.01)

    @contextmanager
    def inside(self, host: int) -> Iterator[None]:
        """This thread is on the host."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{self.names[host]}") as there:
            assert libc.setns(there.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert libc.setns(home.fileno(), CLONE_NEWNET) == 0

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
