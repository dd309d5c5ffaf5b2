"""Misuse of the engine's linear types that must not compile, and the diagnostic that says why.

Each `*.cpp` here holds one offence inside `#ifdef TS_ILLEGAL`. Without that macro the file must be accepted,
with it refused, so a case cannot pass for a wrong reason. Comments at the top of a file steer it:

    // tool: clang-tidy      who refuses it; g++ if there is none (it cannot see use after move)
    // where: A=x B=y        a variant with these macros; several lines, several variants
    // expect: text          what the diagnostic must say; {A} stands for the variant's A
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
CLANG_TIDY = ROOT / ".venv" / "bin" / "clang-tidy"


@dataclass(frozen=True)
class Case:
    path: Path
    tool: str
    macros: tuple[str, ...]
    expect: str

    def __str__(self) -> str:
        return "-".join([self.path.stem, *(m.split("=")[1] for m in self.macros)])


def read_cases(path: Path) -> list[Case]:
    comments = re.findall(r"^// (tool|where|expect): (.*)$", path.read_text(), re.MULTILINE)
    of = {key: [text for k, text in comments if k == key] for key in ("tool", "where", "expect")}
    assert len(of["expect"]) == 1, f"{path.name} must say once what its diagnostic is"
    tool = of["tool"][0] if of["tool"] else "g++"
    cases = []
    for where in of["where"] or [""]:
        expect = of["expect"][0]
        for macro in where.split():
            name, value = macro.split("=")
            expect = expect.replace("{" + name + "}", value)
        cases.append(Case(path, tool, tuple(where.split()), expect))
    return cases


CASES = [case for path in sorted(HERE.glob("*.cpp")) for case in read_cases(path)]


@pytest.fixture(scope="session")
def precompiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The headers, parsed once: each case then costs a tenth of a second."""
    header = tmp_path_factory.mktemp("compile_fail") / "control_plane.h"
    header.write_text('#include "scheduler.h"\n')
    output = header.with_suffix(".h.gch")
    subprocess.run(["g++", *FLAGS, "-x", "c++-header", str(header), "-o", str(output)], check=True)
    return header


def compiled(case: Case, header: Path, illegal: bool) -> subprocess.CompletedProcess[str]:
    macros = [f"-D{m}" for m in case.macros] + (["-DTS_ILLEGAL"] if illegal else [])
    if case.tool == "clang-tidy":
        tidy = [str(CLANG_TIDY), "--quiet", f"--config-file={ROOT / '.clang-tidy'}", str(case.path), "--"]
        command = [*tidy, "-include", str(ROOT / "csrc" / "scheduler.h"), *FLAGS, *macros]
    else:
        command = ["g++", "-include", str(header), "-fsyntax-only", *FLAGS, *macros, str(case.path)]
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_does_not_compile(case: Case, precompiled: Path) -> None:
    refused = compiled(case, precompiled, illegal=True)
    said = refused.stdout + refused.stderr
    assert refused.returncode != 0, f"{case} compiles"
    assert case.expect in said, f"{case} is refused for another reason:\n{said}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_without_the_offence(case: Case, precompiled: Path) -> None:
    control = compiled(case, precompiled, illegal=False)
    assert control.returncode == 0, control.stdout + control.stderr
