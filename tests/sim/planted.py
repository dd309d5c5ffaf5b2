"""Plants each bug of planted/*.patch into a copy of the engine and runs the simulator on it, which must fail.

python tests/sim/planted.py [NAME ...]     all of them, or those named; needs build/release (make engine)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "release"
PATCHES = Path(__file__).with_name("planted")
TIMEOUT_S = 300


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)


def must(command: list[str]) -> None:
    done = run(command)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stdout}{done.stderr}")


def compile_command(source: str) -> list[str]:
    """How the build compiles `source`, without its input and output."""
    commands = json.loads((BUILD / "compile_commands.json").read_text())
    words = shlex.split(next(entry["command"] for entry in commands if entry["file"] == str(ROOT / source)))
    return words[: words.index("-o")]


def planted(patch: Path) -> tuple[str, str]:
    """(source, its text with the bug). The lines that a patch takes out, with those around them, must occur
    just once."""
    source, *more = re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), re.MULTILINE)
    text = (ROOT / source).read_text()
    for hunk in re.split(r"^@@.*@@.*\n", patch.read_text(), flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))
        if more or text.count(old) != 1:
            raise RuntimeError(f"{patch.name} does not fit {source} any more: plant the bug anew")
        text = text.replace(old, new)
    return source, text


def simulator(patch: Path, folder: Path) -> Path:
    """Builds the simulator with the bug into `folder`."""
    source, text = planted(patch)
    copy, bug, sim = folder / Path(source).name, folder / "bug.o", folder / "sim"
    copy.write_text(text)
    must([*compile_command(source), "-I", str(ROOT / "csrc"), "-o", str(bug), "-c", str(copy)])
    # The object comes first, so that the library's own is not taken.
    test = BUILD / "tests/CMakeFiles/sim_tests.dir/sim/scheduler_sim_test.cpp.o"
    libraries = [str(BUILD / "libtsengine.a"), str(BUILD / "tests/libts_gtest.a"), "-lpthread", "-ldl"]
    must(["c++", "-o", str(sim), str(bug), str(test), *libraries])
    return sim


def caught(patch: Path) -> str:
    """What the simulator said of the bug; empty if it noticed nothing."""
    with tempfile.TemporaryDirectory() as folder:
        done = run([str(simulator(patch, Path(folder))), "--gtest_brief=1"])
    if done.returncode == 0:
        return ""
    said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    died = [f"died of signal {-done.returncode}"] if done.returncode < 0 else []
    what = next((line for line in said if "engine bug" in line or "Failure" in line), [*died, *said, "?"][0])
    events = re.search(r"these (\d+) of its (\d+) events", done.stdout)
    return f"{what}; in {events[1]} events of {events[2]}" if events else what


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    names = parser.parse_args().names
    patches = sorted(p for p in PATCHES.glob("*.patch") if not names or p.stem in names)
    if not patches:
        sys.exit(f"planted.py: no such bug; {PATCHES} has them")
    missed = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for patch, said in zip(patches, pool.map(caught, patches), strict=True):
            print(f"{'caught' if said else 'MISSED'}  {patch.stem}: {said}", flush=True)
            missed += [] if said else [patch.stem]
    print(f"{len(patches) - len(missed)} of {len(patches)} planted bugs caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
