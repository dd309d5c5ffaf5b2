"""The process that holds Triton: compiles one kernel after the other, as it is asked on its input.

Started by tscompile/kernels/gpu/build.py by its path, with an environment of its own; imports nothing of
tscompile. A line of JSON in, {"source", "symbol", "types", "num_warps", "num_stages", "target"}; a line out,
{"binary" (base64), "shared", "num_warps", ...}, or {"error"}, or {"unusable"}: what of Triton cannot be
imported. A cubin comes with "ptxas", its assembler's words; a code object of an AMD GPU, which Triton
assembles and links itself, with "isa", the text that it is assembled from.

ptxas runs beside its input, under fixed names and without address randomisation: that of CUDA 13.1 orders
what it emits by addresses, and gave one of two cubins for the same PTX otherwise. Where the system forbids
that (seccomp), "randomised" says so.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ADDR_NO_RANDOMIZE = 0x0040000  # personality(2)
METADATA = (
    "shared",
    "num_warps",
    "num_ctas",
    "tmem_size",
    "global_scratch_size",
    "profile_scratch_size",
    "name",
)  # none that a backend has not


def compile_kernel(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The answer to a job. folder: where its files lie meanwhile."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    said: list[str] = []

    def stages_hook(*arguments: Any) -> Any:
        if not arguments:  # Triton asks what to add to its cache's key
            return "", ""
        backend, stages, options, *_ = arguments
        if "cubin" in stages:
            stages["cubin"] = lambda ptx, _: assemble(ptx, backend.target.arch, options, folder, said)
        return None

    knobs.runtime.add_stages_inspection_hook = stages_hook
    path = folder / "kernel.py"
    path.write_text(job["source"])
    spec = importlib.util.spec_from_file_location("kernel", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, job["symbol"])
    names = function.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(names))}
    source = ASTSource(function, dict(zip(names, job["types"], strict=True)), attrs=aligned)
    options = {"num_warps": job["num_warps"], "num_stages": job["num_stages"]}
    done = triton.compile(source, target=GPUTarget(*job["target"]), options=options)
    answer = {name: getattr(done.metadata, name, 0) for name in METADATA}
    if said:
        return answer | {"binary": base64.b64encode(done.asm["cubin"]).decode(), "ptxas": said[0]}
    return answer | {"binary": base64.b64encode(done.asm["hsaco"]).decode(), "isa": done.asm["amdgcn"]}


def assemble(ptx: str, arch: int, options: Any, folder: Path, said: list[str]) -> bytes:
    """PTX -> cubin. said: what ptxas says is added."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    (folder / "kernel.ptx").write_text(ptx)
    command = [
        get_ptxas(arch).path,
        "-v",
        "--regAllocOptLevel=2",
        f"--gpu-name={sm_arch_from_capability(arch)}",
    ]
    if not options.enable_fp_fusion:
        command.append("--fmad=false")
    done = subprocess.run(
        [*command, "kernel.ptx", "-o", "kernel.cubin"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"ptxas ended with status {done.returncode}: {done.stderr.strip()}")
    said.append(done.stderr)
    return (folder / "kernel.cubin").read_bytes()


def main() -> None:
    """Answers jobs until its input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    randomised = ctypes.CDLL(None).personality(ctypes.c_ulong(ADDR_NO_RANDOMIZE)) < 0
    for line in sys.stdin:
        with tempfile.TemporaryDirectory(prefix="tscompile-") as name:
            os.environ["TRITON_CACHE_DIR"] = os.path.join(name, "cache")
            printed = io.StringIO()
            try:
                with contextlib.redirect_stdout(printed):
                    answer = compile_kernel(json.loads(line), Path(name)) | {"randomised": randomised}
            except ImportError as error:
                answer = {"unusable": f"{type(error).__name__}: {error}"}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
