"""A typed ctypes client of csrc/engine.h, for tests. Token ids in, token ids out."""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]

OK, BAD_PLAN, BAD_REQUEST, NO_TARGET, BUSY, CLOSED, IO, NO_MEMORY, INTERNAL = range(9)
VERIFY_AUTO, VERIFY_ALWAYS = 0, 1
TOKEN, FINISHED = 1, 2
FINISH = {1: "stop", 2: "length", 3: "cancelled", 4: "error", 5: "timeout"}


class EngineError(Exception):
    """What a call answered but TS_OK."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Error(c.Structure):
    _fields_ = (("message", c.c_char * 1000),)


class _Options(c.Structure):
    _fields_ = (
        ("size", c.c_uint32),
        ("event_size", c.c_uint32),
        ("num_threads", c.c_int32),
        ("num_pages", c.c_int32),
        ("kv_bytes", c.c_int64),
        ("token_budget", c.c_int32),
        ("max_seqs", c.c_int32),
        ("max_queue", c.c_int32),
        ("prefix_cache", c.c_int32),
        ("max_draft", c.c_int32),
        ("patience_ms", c.c_int32),
        ("target_tpot_us", c.c_int32),
        ("overlap_schedule", c.c_int32),
        ("target", c.c_char_p),
        ("rank", c.c_int32),
        ("rank_timeout_ms", c.c_int32),
        ("rendezvous", c.c_char_p),
        ("rank_pids", c.POINTER(c.c_int32)),
        ("ranks_here", c.c_int32),
        ("mpi_library", c.c_char_p),
        ("record", c.c_char_p),
        ("cuda_library", c.c_char_p),
        ("offload_bytes", c.c_int64),
        ("offload_folder", c.c_char_p),
    )


class _Bias(c.Structure):
    _fields_ = (("token", c.c_int32), ("bias", c.c_float))


class _Request(c.Structure):
    _fields_ = (
        ("size", c.c_uint32),
        ("id", c.c_uint64),
        ("prompt", c.POINTER(c.c_int32)),
        ("num_prompt", c.c_int32),
        ("max_tokens", c.c_int32),
        ("temperature", c.c_float),
        ("top_k", c.c_int32),
        ("top_p", c.c_float),
        ("min_p", c.c_float),
        ("repetition_penalty", c.c_float),
        ("presence_penalty", c.c_float),
        ("frequency_penalty", c.c_float),
        ("seed", c.c_uint64),
        ("logit_bias", c.POINTER(_Bias)),
        ("num_logit_bias", c.c_int32),
        ("stop_tokens", c.POINTER(c.c_int32)),
        ("num_stop_tokens", c.c_int32),
        ("ignore_eos", c.c_int32),
        ("num_logprobs", c.c_int32),
        ("cache_salt", c.c_char_p),
        ("num_cache_salt", c.c_int32),
        ("lease_ms", c.c_int32),
        ("session", c.c_uint64),
        ("tenant", c.c_uint64),
        ("priority", c.c_int32),
        ("timeout_ms", c.c_int32),
    )


class _Event(c.Structure):
    _fields_ = (
        ("id", c.c_uint64),
        ("kind", c.c_int32),
        ("finish", c.c_int32),
        ("token", c.c_int32),
        ("logprob", c.c_float),
        ("num_top", c.c_int32),
        ("top_tokens", c.POINTER(c.c_int32)),
        ("top_logprobs", c.POINTER(c.c_float)),
        ("num_cached", c.c_int32),
        ("miss", c.c_int32),
        ("message", c.c_char_p),
        ("miss_at", c.c_int32),
        ("num_restored", c.c_int32),
    )


class Stats(c.Structure):
    _fields_ = (
        ("size", c.c_uint32),
        *((name, c.c_int32) for name in ("num_waiting", "num_running")),
        *((name, c.c_int32) for name in ("num_pages", "num_pages_free", "num_pages_cached")),
        *((name, c.c_uint64) for name in ("num_steps", "num_prompt_tokens", "num_cached_tokens")),
        *((name, c.c_uint64) for name in ("num_output_tokens", "num_preemptions", "num_finished")),
        *((name, c.c_uint64) for name in ("step_ns", "schedule_ns")),
        *((name, c.c_int32) for name in ("num_threads", "max_context", "vocab_size")),
        *((name, c.c_int32) for name in ("page_size", "token_budget", "max_seqs")),
        ("target", c.c_char * 32),
        ("num_drafted_tokens", c.c_uint64),
        ("num_accepted_tokens", c.c_uint64),
        ("num_slots", c.c_int32),
        ("num_slots_held", c.c_int32),
        *(
            (name, c.c_uint64)
            for name in ("num_restored_tokens", "num_pages_kept", "num_pages_restored", "num_pages_broken")
        ),
    )


@dataclass(frozen=True)
class Request:
    """As ts_request, with its defaults: greedy, no logprobs."""

    prompt: Sequence[int]
    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: Sequence[tuple[int, float]] = ()
    stop_tokens: Sequence[int] = ()
    ignore_eos: bool = False
    num_logprobs: int = -1
    cache_salt: bytes = b""
    lease_ms: int = 0
    session: int = 0
    tenant: int = 0
    priority: int = 0
    timeout_ms: int = 0


@dataclass
class Answer:
    """Output tokens; for each its log probability and (with num_logprobs) the most likely ids with theirs.
    Floats hold the engine's f32 exactly, so == compares bits but for the sign of zero."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[list[int], list[float]]] = field(default_factory=list)
    finish: str = ""
    message: str = ""
    num_cached: int = 0
    num_restored: int = 0
    miss: int = 0

    @property
    def output(self) -> tuple[object, ...]:
        """All that must not depend on company."""
        return self.tokens, self.logprobs, self.top, self.finish


def library_path() -> Path:
    """The engine's shared library: $TS_ENGINE_LIBRARY, or what `make engine` builds."""
    path = Path(os.environ.get("TS_ENGINE_LIBRARY", ROOT / "build" / "release" / "libtsengine.so"))
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: make engine builds it")
    return path


_library: c.CDLL | None = None


def library() -> c.CDLL:
    global _library  # noqa: PLW0603
    if _library is None:
        lib = c.CDLL(str(library_path()))
        error = c.POINTER(_Error)
        prototypes = {
            "ts_plan_open": (c.c_int, [c.c_char_p, c.c_int, c.POINTER(c.c_void_p), error]),
            "ts_plan_entry": (
                c.c_int,
                [c.c_void_p, c.c_char_p, c.POINTER(c.POINTER(c.c_uint8)), c.POINTER(c.c_size_t)],
            ),
            "ts_plan_close": (None, [c.c_void_p]),
            "ts_engine_open": (c.c_int, [c.c_void_p, c.POINTER(_Options), c.POINTER(c.c_void_p), error]),
            "ts_engine_close": (None, [c.c_void_p]),
            "ts_rank_run": (c.c_int, [c.c_void_p, c.POINTER(_Options), error]),
            "ts_engine_submit": (c.c_int, [c.c_void_p, c.POINTER(_Request), error]),
            "ts_engine_cancel": (None, [c.c_void_p, c.c_uint64]),
            "ts_engine_poll": (c.c_int32, [c.c_void_p, c.POINTER(_Event), c.c_int32, c.c_int32]),
            "ts_engine_stats": (None, [c.c_void_p, c.POINTER(Stats)]),
        }
        for name, (result, arguments) in prototypes.items():
            getattr(lib, name).restype, getattr(lib, name).argtypes = result, arguments
        _library = lib
    return _library


def _check(status: int, error: _Error) -> None:
    if status != OK:
        raise EngineError(status, error.message.decode())


class Plan:
    """An open plan. Close engines over it first."""

    def __init__(self, path: Path | str, verify: int = VERIFY_AUTO) -> None:
        self.handle, error = c.c_void_p(), _Error()
        _check(library().ts_plan_open(os.fsencode(path), verify, c.byref(self.handle), c.byref(error)), error)

    def entry(self, name: str) -> bytes:
        data, size = c.POINTER(c.c_uint8)(), c.c_size_t()
        status = library().ts_plan_entry(self.handle, name.encode(), c.byref(data), c.byref(size))
        if status != OK:
            raise KeyError(name)
        return c.string_at(data, size.value)

    def close(self) -> None:
        library().ts_plan_close(self.handle)
        self.handle = c.c_void_p()

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Engine:
    """A running engine over the plan at `path`. Options as ts_engine_options; the prefix cache is on unless
    told otherwise."""

    def __init__(
        self,
        path: Path | str,
        *,
        num_threads: int = 0,
        num_pages: int = 0,
        kv_bytes: int = 0,
        token_budget: int = 0,
        max_seqs: int = 0,
        max_queue: int = 0,
        prefix_cache: bool = True,
        max_draft: int = 0,
        target_tpot_us: int = 0,
        overlap_schedule: bool = False,
        target: str | None = None,
        verify: int = VERIFY_AUTO,
        rendezvous: bytes | None = None,
        rank_pids: c.Array[c.c_int32] | None = None,
        ranks_here: int = 0,
        mpi_library: bytes | None = None,
        cuda_library: bytes | None = None,
        offload_bytes: int = 0,
        offload_folder: Path | None = None,
    ) -> None:
        self.plan = Plan(path, verify)
        options = _Options(
            c.sizeof(_Options),
            c.sizeof(_Event),
            num_threads,
            num_pages,
            kv_bytes,
            token_budget,
            max_seqs,
            max_queue,
            int(prefix_cache),
            max_draft,
            0,
            target_tpot_us,
            int(overlap_schedule),
            target.encode() if target else None,
            rendezvous=rendezvous,
            rank_pids=rank_pids,
            ranks_here=ranks_here,
            mpi_library=mpi_library,
            cuda_library=cuda_library,
            offload_bytes=offload_bytes,
            offload_folder=os.fsencode(offload_folder) if offload_folder else None,
        )
        self.handle, error = c.c_void_p(), _Error()
        status = library().ts_engine_open(
            self.plan.handle, c.byref(options), c.byref(self.handle), c.byref(error)
        )
        if status != OK:
            self.plan.close()
        _check(status, error)
        self._next_id = 1
        self._events = (_Event * 256)()

    def submit(self, request: Request) -> int:
        """The id under which its events come. EngineError if the engine refuses it."""
        prompt = (c.c_int32 * len(request.prompt))(*request.prompt)
        bias = (_Bias * len(request.logit_bias))(*request.logit_bias)
        stop = (c.c_int32 * len(request.stop_tokens))(*request.stop_tokens)
        number, error = self._next_id, _Error()
        self._next_id += 1
        raw = _Request(
            c.sizeof(_Request),
            number,
            prompt,
            len(prompt),
            request.max_tokens,
            request.temperature,
            request.top_k,
            request.top_p,
            request.min_p,
            request.repetition_penalty,
            request.presence_penalty,
            request.frequency_penalty,
            request.seed,
            bias,
            len(bias),
            stop,
            len(stop),
            int(request.ignore_eos),
            request.num_logprobs,
            request.cache_salt,
            len(request.cache_salt),
            request.lease_ms,
            request.session,
            request.tenant,
            request.priority,
            request.timeout_ms,
        )
        _check(library().ts_engine_submit(self.handle, c.byref(raw), c.byref(error)), error)
        return number

    def cancel(self, number: int) -> None:
        library().ts_engine_cancel(self.handle, number)

    def poll(self, answers: dict[int, Answer], timeout_ms: int = 60_000) -> list[int]:
        """Waits for events and adds them to `answers`. The ids that finished. TimeoutError if none came."""
        count = library().ts_engine_poll(self.handle, self._events, len(self._events), timeout_ms)
        if count == 0:
            raise TimeoutError(f"no event in {timeout_ms} ms; waited for {sorted(answers)}")
        finished = []
        for event in self._events[: max(count, 0)]:
            answer = answers[event.id]
            assert not answer.finish, f"an event of {event.id} after its last"
            if event.kind == FINISHED:
                answer.finish = FINISH[event.finish]
                answer.message = (event.message or b"").decode()
                answer.num_cached = event.num_cached
                answer.num_restored = event.num_restored
                answer.miss = event.miss
                finished.append(event.id)
            else:
                answer.tokens.append(event.token)
                answer.logprobs.append(event.logprob)
                answer.top.append((event.top_tokens[: event.num_top], event.top_logprobs[: event.num_top]))
        return finished

    def generate(self, requests: Iterable[Request]) -> list[Answer]:
        """All at once; their answers, in order."""
        answers = {self.submit(request): Answer() for request in requests}
        waiting = set(answers)
        while waiting:
            waiting -= set(self.poll(answers))
        return list(answers.values())

    def stats(self) -> Stats:
        stats = Stats(size=c.sizeof(Stats))
        library().ts_engine_stats(self.handle, c.byref(stats))
        return stats

    @property
    def target(self) -> str:
        return str(self.stats().target.decode())

    def close(self) -> None:
        library().ts_engine_close(self.handle)
        self.handle = c.c_void_p()
        self.plan.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
