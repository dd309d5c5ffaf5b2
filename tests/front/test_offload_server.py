"""Pages that were evicted come back to `tsruntime run`; what became of them shows in usage and metrics."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from front_server import Server

# Two prompts that leave no room for each other.
PROMPTS = [[(seed * 131 + i * i * 7) % 4000 + 1 for i in range(700)] for seed in range(2)]
TIGHT = ("--num-pages", "16", "--max-seqs", "2")
# Tokens of a prompt that stay in the cache: the other takes 12 pages of the 16, the deepest first.
HELD = 4 * 64


def ask(server: Server) -> list[tuple[str, dict[str, Any]]]:
    """Text and what is told of the prompt, of each of them."""
    answers = [server.complete(prompt, max_tokens=8, ignore_eos=True) for prompt in PROMPTS]
    return [(a["choices"][0]["text"], a["usage"]["prompt_tokens_details"]) for a in answers]


def file_of(server: Server, folder: Path) -> Path:
    numbers = Path(f"/proc/{server.process.pid}/fd")
    return next(at for at in numbers.iterdir() if os.readlink(at).startswith(f"{folder}/"))


def test_changed_bytes_on_disk_cost_time_only(
    start: Callable[..., Server], executable: Path, plan: Path, tmp_path: Path
) -> None:
    plain = ask(start(*TIGHT, "--no-prefix-cache"))
    folder = tmp_path / "tier"
    folder.mkdir()
    trace = tmp_path / "run.trace"
    offload = ("--kv-offload", "64M", "--kv-offload-dir", str(folder))
    server = start(*TIGHT, *offload, "--record", str(trace))
    assert [text for text, _ in ask(server)] == [text for text, _ in plain]
    again = ask(server)
    assert [text for text, _ in again] == [text for text, _ in plain]
    for _, details in again:
        assert details == {"cached_tokens": 640, "restored_tokens": 640 - HELD}
    metrics = server.metrics()
    assert metrics["external_prefix_cache_hits_total"] == sum(d["restored_tokens"] for _, d in again)
    assert metrics["kv_offload_pages_loaded_total"] * 64 == metrics["external_prefix_cache_hits_total"]
    assert metrics["kv_offload_pages_failed_total"] == 0
    assert 0 < metrics["kv_offload_usage_perc"] < 1

    path = file_of(server, folder)
    assert path.stat().st_mode & 0o777 == 0o600
    with path.open("r+b") as file:
        held = file.read()
        file.seek(0)
        file.write(bytes(byte ^ 1 for byte in held[: 16 << 20]))
    damaged = ask(server)
    assert [text for text, _ in damaged] == [text for text, _ in plain]
    for _, details in damaged:  # what never left the cache, and nothing else
        assert details == {"cached_tokens": HELD, "cache_miss": {"reason": "broken", "token": HELD}}
    assert server.metrics()["kv_offload_pages_failed_total"] > 0
    assert "tsruntime: an evicted page came back changed" in server.log.read_text()
    assert list(folder.iterdir()) == []
    assert server.stop() == 0

    for where in ([], ["--kv-offload-dir", str(folder)]):  # where no page is damaged
        command = [str(executable), "replay", str(plan), str(trace), "--json", *where]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert (said["difference"], said["requests"], said["output_tokens"]) == (None, 6, 48)
