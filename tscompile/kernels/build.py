"""Sources -> one shared object a target, compiled in parallel and cached by content.
 The same sources and the same compiler give the same bytes in any folder: files have fixed names, the
compiler runs beside them with a fixed environment, and nothing records a path or a time. What is cached
appears whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tscompile.errors import CompileError

COMPILE = (
    *(
        "-std=c++20",
        "-O2",
        "-fPIC",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fno-strict-aliasing",
    ),
    *("-fno-exceptions", "-fno-rtti", "-fno-asynchronous-unwind-tables", "-fno-stack-protector"),
    *("-fvisibility=hidden", "-ffunction-sections", "-fno-ident", "-frandom-seed=0", "-w"),
)
LINK = (
    *(
        "-shared",
        "-nostdlib",
        "-Wl,--no-undefined",
        "-Wl,--build-id=none",
        "-Wl,--strip-all",
        "-Wl,-z,noexecstack",
    ),
    *("-Wl,-z,now", "-Wl,--hash-style=gnu", "-Wl,--gc-sections", "-Wl,--version-script=exports"),
)
# A compiler may turn a loop or a copy into a call of these, which no library gives.
SUPPORT = """
extern "C" {
void *memset(void *to, int value, __SIZE_TYPE__ n) {
  for (__SIZE_TYPE__ i = 0; i < n; ++i) ((volatile char *)to)[i] = (char)value;
  return to;
}
void *memcpy(void *to, const void *from, __SIZE_TYPE__ n) {
  for (__SIZE_TYPE__ i = 0; i < n; ++i) ((volatile char *)to)[i] = ((const char *)from)[i];
  return to;
}
}
"""
Progress = Callable[[int, int], None]  # kernels done, of how many


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler. command: what runs it."""

    command: tuple[str, ...]

    @cached_property
    def version(self) -> str:
        """The compiler's and the linker's own words, for the plan and for cache keys."""
        name, _, rest = self._first_line("--version").partition(" ")
        if name == Path(self.command[0]).name:
            name = "gcc"  # it says how it was called
        return f"{name} {rest}, {self._first_line('-Wl,--version')}"

    def _first_line(self, option: str) -> str:
        return (self.run([option], Path.cwd()).stdout.splitlines() or [""])[0]

    def run(self, arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
        kept = (
            "PATH",
            "HOME",
            "TMPDIR",
            "LD_LIBRARY_PATH",
        )  # not CPATH and its like, which change what is compiled
        environment = {name: os.environ[name] for name in kept if name in os.environ} | {"LC_ALL": "C"}
        return subprocess.run(
            [*self.command, *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )


def find_compiler() -> Compiler:
    """$CXX, or c++, or g++. CompileError if there is none."""
    wanted = os.environ.get("CXX", "")
    tried = [shlex.split(wanted)] if wanted.strip() else [["c++"], ["g++"]]
    for command in tried:
        if shutil.which(command[0]):
            return Compiler(tuple(command))
    names = " and ".join(command[0] for command in tried)
    raise CompileError(f"no C++ compiler: looked for {names}. Install g++ (12 or later), or set CXX to one")


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    # a relative XDG_CACHE_HOME is invalid, says its specification
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "tscompile"


def build(
    sources: Mapping[str, str],
    headers: Mapping[str, str],
    flags: Sequence[str],
    *,
    compiler: Compiler,
    cache: Path,
    progress: Progress = lambda done, total: None,
) -> bytes:
    """The shared object of `sources` (symbol -> C++). It exports the symbols and needs nothing.

    CompileError if the cache cannot be written, or, with its message, if the compiler fails."""
    everything = {**sources, "support": SUPPORT}
    common = [compiler.version, *COMPILE, *flags, *(f"{name}\n{headers[name]}" for name in sorted(headers))]
    keys = {name: _hash([*common, everything[name]]) for name in sorted(everything)}
    library = cache / "libraries" / f"{_hash([*LINK, *keys, *keys.values()])}.so"
    if library.is_file():
        progress(len(sources), len(sources))
        return library.read_bytes()
    objects = {name: cache / "objects" / f"{key}.o" for name, key in keys.items()}
    missing = [name for name, path in objects.items() if not path.is_file()]
    done = len(sources) - sum(name in sources for name in missing)
    try:
        for folder in (library.parent, cache / "objects"):
            folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:

            def compile_one(name: str) -> None:
                _compile(everything[name], headers, flags, compiler, objects[name])

            for name, _ in zip(missing, pool.map(compile_one, missing), strict=True):
                done += name in sources
                progress(done, len(sources))
        _link(objects, sources, compiler, library)
    except OSError as error:
        raise CompileError(
            f"cannot write the kernel cache in {cache}: {error.strerror or error}. "
            "XDG_CACHE_HOME names another place for it"
        ) from error
    return library.read_bytes()


def _hash(parts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return digest.hexdigest()


def _compile(
    source: str, headers: Mapping[str, str], flags: Sequence[str], compiler: Compiler, target: Path
) -> None:
    with tempfile.TemporaryDirectory(prefix="tscompile-") as name:
        folder = Path(name)
        for header, text in headers.items():
            (folder / header).write_text(text)
        (folder / "kernel.cpp").write_text(source)
        _check(
            compiler.run([*COMPILE, *flags, "-c", "kernel.cpp", "-o", "kernel.o"], folder),
            "compile",
            compiler,
        )
        publish((folder / "kernel.o").read_bytes(), target)


def _link(objects: Mapping[str, Path], exports: Iterable[str], compiler: Compiler, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="tscompile-") as name:
        folder = Path(name)
        names = [f"{symbol}.o" for symbol in sorted(objects)]
        for symbol, path in objects.items():
            shutil.copyfile(path, folder / f"{symbol}.o")
        exported = " ".join(f"{symbol};" for symbol in sorted(exports))
        (folder / "exports").write_text(f"{{ global: {exported} local: *; }};")
        _check(compiler.run([*LINK, *names, "-o", "kernels.so"], folder), "link", compiler)
        publish((folder / "kernels.so").read_bytes(), target)


def _check(result: subprocess.CompletedProcess[str], what: str, compiler: Compiler) -> None:
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()[:20]
        raise CompileError(
            f"{compiler.command[0]} ({compiler.version}) failed to {what} a kernel, with status "
            f"{result.returncode}; wanted g++ 12 or later, which CXX may name. It says:\n" + "\n".join(lines)
        )


def publish(data: bytes, target: Path) -> None:
    """Whole or not at all: a file beside it, synced, then renamed."""
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
