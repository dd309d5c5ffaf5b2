"""The measure of collectives: each library's result is checked before it is timed; the report is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("collectives.py")


def test_the_report(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--quick", "--out", tmp_path]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout
    report = json.loads(printed.splitlines()[-1])
    (file,) = tmp_path.glob("*-collectives.json")
    assert json.loads(file.read_text()) == report
    for row in report["rows"]:
        assert {"all_reduce", "all_reduce, MPI", "all_reduce, Gloo"} <= row["us"].keys()
        assert all(0 < row["least_us"][name] <= us for name, us in row["us"].items())
    (text,) = tmp_path.glob("*-collectives.md")
    assert f"| {report['rows'][0]['bytes']:,} | " in text.read_text()
