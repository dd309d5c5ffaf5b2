"""A plan, the executable, and servers for the tests of the front."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from front_server import Server

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def executable() -> Path:
    for path in (Path(sys.executable).parent / "tsruntime", ROOT / "tsruntime/target/release/tsruntime"):
        if path.exists():
            return path
    raise FileNotFoundError("tsruntime is not built: run `make build`")


@pytest.fixture(scope="session")
def plan(demo_plan: Path) -> Path:
    return demo_plan


@pytest.fixture(scope="session")
def plan_without_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "ids.tsp"
    command = [sys.executable, "-m", "tscompile.cli", "build", str(ROOT / "artifacts/demo"), "-o", str(path)]
    done = subprocess.run([*command, "--no-text"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The demo checkpoint in float32 for a mesh: plans(tp=2, dp=2)."""
    folder, built = tmp_path_factory.mktemp("ranks"), {}

    def plan(**mesh: int) -> Path:
        axes = [f"--{axis}={size}" for axis, size in sorted(mesh.items())]
        name = "".join(axes)
        if name not in built:
            path = folder / f"demo{name}.tsp"
            command = [sys.executable, "-m", "tscompile.cli", "build", "artifacts/demo", "-o", str(path)]
            command += ["--dtype", "fp32", *axes, "--no-text"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            built[name] = path
        return built[name]

    return plan


Start = Callable[..., Server]


@pytest.fixture
def start(executable: Path, plan: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a server with these arguments; it is stopped after the test."""
    servers: list[Server] = []

    def start(*arguments: str, **environment: str) -> Server:
        log = tmp_path / f"server-{len(servers)}.log"
        servers.append(Server(executable, plan, log, *arguments, **environment))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def server(executable: Path, plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for a module's tests. It must outlive them all, and drain at the end."""
    server = Server(executable, plan, tmp_path_factory.mktemp("server") / "log")
    try:
        yield server
        assert server.process.poll() is None, server.log.read_text()
        assert server.stop() == 0
    finally:
        server.process.kill()
        server.process.wait()
