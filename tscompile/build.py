"""What the passes share: the options, and the state of one build. A pass is `run(build: Build) -> None`.

Up to `overlap` a pass reads and replaces `build.graph` and knows no target's kernels; from `propagate` on it
does so for every bucket of tokens. From `select` on, `build.targets[target]` is filled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tscompile.ir import Graph, Group
from tscompile.mesh import Mesh

if TYPE_CHECKING:
    from tscompile.checkpoint import Checkpoint
    from tscompile.kernels.gpu.spec import GpuStep


@dataclass(frozen=True)
class Options:
    """The command line of `tscompile build`, checked."""

    model: Path  # the model file
    weights: Path  # the checkpoint's folder
    out: Path = Path("plan.tsp")
    targets: tuple[str, ...] = ()  # empty: this machine's best
    dtype: str = (
        "bf16"  # bf16 or f32 (the command line says fp32): weights, what a linear reads, the KV cache
    )
    dump: Path | None = None
    verify: bool = False
    no_text: bool = False  # a plan without tokenizer and chat template
    tp: int = 1
    ep: int = 1
    dp: int = 1
    cp: int = 1
    pp: int = 1
    tokens: int = 0  # of the step that placements are chosen for; 0: max_tokens
    max_context: int = 0  # 0: what config.json says
    page_size: int = 64  # tokens of a KV page that a rank holds
    kernels_lock: Path | None = None  # of GPU targets (tscompile/kernels/gpu/lockfile.py)
    max_tokens: int = 512  # T of a step
    max_seqs: int = 64  # S of a step

    @property
    def mesh(self) -> Mesh:
        """The axes asked for; tp alone, if none."""
        # cp last: heads that tp has shared out are gathered over cp alone
        asked = (("pp", self.pp), ("dp", self.dp), ("ep", self.ep), ("tp", self.tp), ("cp", self.cp))
        return Mesh(tuple((axis, size) for axis, size in asked if size > 1) or (("tp", 1),))


@dataclass(frozen=True)
class ModelInfo:
    """The manifest's "model"."""

    name: str
    architecture: str
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str  # "bf16" or "f32"


@dataclass(frozen=True)
class Receipt:
    """What `fuse` tried: a pattern, where (an op's name and its source line), and whether it matched, or why
    not. Of `overlap`, a collective, and what runs beside it."""

    pattern: str
    where: str
    source: str
    matched: bool
    reason: str = ""


@dataclass(frozen=True)
class Bucket:
    """What a target runs in a step of some range of tokens. steps: the launches: the graph's groups, those
    that this target runs in several launches cut up. symbols: a step's name -> its kernel's; a collective
    has none. device: of a GPU target instead, a step's name -> its kernels and their grids."""

    graph: Graph
    steps: list[Group]
    symbols: dict[str, str] = field(default_factory=dict)
    device: dict[str, GpuStep] = field(default_factory=dict)


@dataclass
class TargetBuild:
    """What the passes from `select` on make for one target."""

    target: str
    # by `select`: as build.buckets; of a GPU target more, each a size of step that is captured
    buckets: dict[int, Bucket] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)  # by `select`: a weight's name -> "rows" or "tiles"
    kernels: Any = (
        None  # by `select`, for `emit`: the kernel descriptions and configurations (tscompile/kernels)
    )
    library: bytes = b""  # by `emit`: the shared object, or cubins one after the other
    table: dict[str, Any] = field(default_factory=dict)  # by `emit`, of cubins: the program's "kernels"
    compiler: str = ""  # by `emit`: what compiled it, for the manifest's "producer"
    program: dict[str, Any] = field(default_factory=dict)  # by `arrange`: ARCHITECTURE.md, "The program"


@dataclass
class Build:
    """One build. Each field says which pass fills it."""

    options: Options
    # opened before the first pass: config.json, tensors' names, shapes and dtypes, lazily mapped
    checkpoint: Checkpoint
    mesh: Mesh
    graph: Graph = field(
        default_factory=lambda: Graph("empty")
    )  # capture makes it; every pass to `fuse` rewrites it
    model: ModelInfo | None = None  # capture
    # propagate: where small steps are placed otherwise, the graphs for steps of up to so many tokens;
    # `graph` is that of all larger ones. Weights and KV caches lie alike in all
    smaller: dict[int, Graph] = field(default_factory=dict)
    receipts: list[Receipt] = field(default_factory=list)  # fuse
    targets: dict[str, TargetBuild] = field(default_factory=dict)  # select
    weights: Any = (
        None  # pack: what tscompile/plan.py writes as weights, in order, and its steps ("tsp/pack")
    )
    text: dict[str, bytes] = field(
        default_factory=dict
    )  # text: entry name ("tsp/text/tokenizer", ...) -> bytes
    # of several ranks, stages: the pipeline's; propagate: a bucket after the other, why each op lies as
    # it does; overlap: of each bucket, what runs beside its collectives. The plan's "tsp/placements"
    placed: dict[str, Any] = field(default_factory=lambda: {"stages": [], "buckets": [], "overlaps": []})
    verified: dict[str, Any] = field(
        default_factory=lambda: {"verified": False}
    )  # check, with --verify: the plan's "tsp/verify"
    notes: list[str] = field(default_factory=list)  # one line each, shown at the end of a build

    @property
    def buckets(self) -> dict[int, Graph]:
        """Steps of how many tokens at most -> their graph, ascending."""
        return {**self.smaller, self.options.max_tokens: self.graph}
