"""House rules that a machine can check: sizes of files and functions, links, imports that point one way."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 70
SOURCE_SUFFIXES = {".py", ".rs", ".cpp", ".h", ".c", ".j2"}

# tscompile's modules, foundations first: a module imports only from lines above its own.
LAYERS = [
    {"errors", "resources"},
    {"mesh", "placement"},
    {"ir"},
    {"ops"},
    {"passes", "kernels", "plan"},
    {"pipeline"},
    {"cli"},
]


def tracked(*patterns: str) -> list[Path]:
    """Files git tracks, or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / line for line in sorted(set(out.splitlines())) if (ROOT / line).is_file()]


def test_files_are_short() -> None:
    long = {}
    for path in tracked():
        if not path.is_symlink() and path.suffix in SOURCE_SUFFIXES:
            lines = path.read_text().count("\n")
            if lines > MAX_FILE_LINES:
                long[str(path.relative_to(ROOT))] = lines
    assert not long, f"files over {MAX_FILE_LINES} lines are two things: {long}"


def test_functions_are_short() -> None:
    long = {}
    for path in {p.resolve() for p in tracked("*.py")}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno
                if lines > MAX_FUNCTION_LINES:
                    long[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = lines
    assert not long, f"functions over {MAX_FUNCTION_LINES} lines: {long}"


def test_imports_point_one_way() -> None:
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    wrong = []
    for path in tracked("tscompile/*.py", "tscompile/**/*.py"):
        own = rank.get(path.relative_to(ROOT / "tscompile").parts[0].removesuffix(".py"))
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("tscompile."):
                continue
            other = rank.get((node.module or "").split(".")[1])
            if own is not None and other is not None and other > own:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {node.module}")
    assert not wrong, wrong


def test_the_wheel_carries_what_the_compiler_reads() -> None:
    """maturin follows links to files, not to folders: so each file has its link."""
    data = ROOT / ".wheel.data/purelib/tscompile/data"
    linked = {p.relative_to(data) for p in data.rglob("*") if p.is_symlink()}
    wanted = {p.relative_to(ROOT) for p in tracked("models/*.py", "templates/**", "csrc/launch_abi.h")}
    assert linked == wanted
    assert all((data / p).resolve() == ROOT / p for p in linked)


@pytest.mark.parametrize("document", [p.name for p in tracked("*.md") if p.parent == ROOT])
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    targets = [t.split("#")[0] for t in re.findall(r"\]\(([^)]+)\)", text) if "://" not in t]
    missing = [t for t in targets if t and not (ROOT / t).exists()]
    assert not missing, f"{document} links to {missing}"


def test_readme_names_only_make_targets_that_exist() -> None:
    named = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text()))
    defined = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named, "the README opens with the make targets"
    assert named <= defined, f"README names targets that the Makefile lacks: {sorted(named - defined)}"
