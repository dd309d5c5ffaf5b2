"""One kernel of a device target: a Triton function of pointers alone, all else compiled in.

Its parameters are pointers, 8 bytes each, in the order of `params`; Triton adds two more, of global scratch
and of profile scratch, which no kernel here uses: null.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from tscompile.kernels.desc import Arg, KernelDesc

POINTER_BYTES = 8
SCRATCH = ("global_scratch", "profile_scratch")  # what Triton adds behind every kernel's parameters
TYPES = {"f32": "fp32", "bf16": "bf16", "i32": "i32"}  # our dtype -> Triton's word

# Of the batch, as on the CPU (csrc/launch_abi.h); `sizes` are its first four numbers: num_tokens, num_seqs,
# num_logits, page_table_stride.
BATCH = (
    "sizes",
    "token_ids",
    "positions",
    "slots",
    "query_start",
    "context_len",
    "page_table",
    "logit_rows",
)


@dataclass(frozen=True)
class Param:
    """kind: arg (of the description, by role), batch (an array of the batch) or work (bytes that live from
    one kernel of a step to the next)."""

    kind: str
    name: str
    dtype: str

    @property
    def type(self) -> str:
        return "*" + TYPES[self.dtype]


@dataclass(frozen=True)
class Config:
    """How a kernel computes: what its template calls `t`, by name, and Triton's own options."""

    values: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 1

    def __getitem__(self, name: str) -> int:
        return dict(self.values)[name]

    @property
    def text(self) -> str:
        values = " ".join(f"{name}={value}" for name, value in self.values)
        return f"{values} warps={self.num_warps} stages={self.num_stages}"


@dataclass(frozen=True)
class GpuKernel:
    """A kernel: equal ones are compiled once."""

    desc: KernelDesc
    template: str  # templates/triton/<template>.py.j2
    params: tuple[Param, ...]
    config: Config

    @property
    def text(self) -> str:
        """Canonical: equal kernels, equal texts."""
        params = ",".join(f"{p.kind}:{p.name}:{p.dtype}" for p in self.params)
        return f"{self.template} ({params}) {self.config.text} {self.desc.text}"

    @property
    def symbol(self) -> str:
        return f"{self.template}_{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"

    @property
    def table(self) -> list[tuple[int, int]]:
        """(offset, bytes) of every parameter, as they are packed."""
        return [(POINTER_BYTES * i, POINTER_BYTES) for i in range(len(self.params) + len(SCRATCH))]


@dataclass(frozen=True)
class Rows:
    """The most that a step of the bucket has: T tokens, S sequences, L rows of logits."""

    tokens: int
    seqs: int

    def of(self, dim: str) -> int:
        return {"T": self.tokens, "1": 1}.get(dim, self.seqs)


@dataclass(frozen=True)
class Work:
    """Bytes between two kernels of one step."""

    name: str
    num_bytes: int
    dtype: str = "f32"


@dataclass(frozen=True)
class GpuLaunch:
    """grid: of a step with as many tokens as its bucket holds; programs beyond the step's own end at once."""

    kernel: GpuKernel
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class GpuStep:
    """The launches that compute one description in one bucket, in order, and what they share."""

    launches: tuple[GpuLaunch, ...]
    work: tuple[Work, ...] = ()


def pow2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def warps_for(elements: int, each: int = 8, warp: int = 32) -> int:
    """Such that a thread has about `each` of the elements. warp: its threads."""
    return min(max(pow2(elements // (warp * each)), 1), 512 // warp)


def kernel_of(
    made: KernelDesc,
    dtypes: Mapping[str, str],
    batch: tuple[str, ...],
    config: Config,
    *,
    template: str = "",
    work: tuple[Work, ...] = (),
    without: tuple[str, ...] = (),
) -> GpuKernel:
    """dtypes: of each argument, by role; batch: the arrays that it reads beside `sizes`; work: what it takes
    besides; without: arguments that it does not take."""

    def param(arg: Arg) -> Param:
        return Param("arg", arg.roles[0], dtypes[arg.roles[0]])

    args = [param(arg) for arg in made.args if arg.roles[0] not in without]
    arrays = [Param("batch", name, "i32") for name in BATCH if name in ("sizes", *batch)]
    between = [Param("work", item.name, item.dtype) for item in work]
    return GpuKernel(made, template or made.kind, (*args, *arrays, *between), config)


def one_launch(kernel: GpuKernel, *grid: int) -> GpuStep:
    x, y, z = (*grid, 1, 1)[:3]
    return GpuStep((GpuLaunch(kernel, (x, y, z)),))
