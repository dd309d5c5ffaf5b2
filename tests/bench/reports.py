"""What the benches share: whose figures they are, and how a report is kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "artifacts" / "bench"


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")


def keep(report: dict[str, Any], text: str, name: str, folder: Path) -> None:
    """As <date>-<name> in `folder`, to read and for scripts."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{report['date']}-{name}"
    file.with_suffix(".md").write_text(text)
    file.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{name}: wrote {file.with_suffix('.md')}", file=sys.stderr, flush=True)
