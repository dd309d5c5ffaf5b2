"""Offline generation: a `tsruntime generate --jsonl` process keeps an engine open, and takes JSON lines."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import IO, Any

from tsruntime._find import find_executable

Answer = dict[str, Any]
Prompt = str | Sequence[int]


class RuntimeFailure(RuntimeError):
    """The process could not start (a damaged plan, no memory), or ended too early. The text is its own."""


class RequestError(ValueError):
    """A request that cannot be served: the `index`th given. `param` is the field at fault, or None."""

    def __init__(self, index: int, message: str, param: str | None) -> None:
        super().__init__(f"request {index}: {message}")
        self.index = index
        self.param = param


class LLM:
    """A loaded plan.

    `options` are the engine's, named as on the command line with underscores: threads, kv_bytes, num_pages,
    token_budget, max_seqs, max_queue, no_prefix_cache, max_draft, target, verify. RuntimeFailure if the plan
    cannot be loaded. Close it, or use it as a context manager. One thread at a time may call it.
    """

    def __init__(self, plan: str | os.PathLike[str], **options: str | int | bool) -> None:
        command = [str(find_executable()), "generate", os.fspath(plan), "--jsonl"]
        for name, value in options.items():
            flag = "--" + name.replace("_", "-")
            if value is True:
                command.append(flag)
            elif value is not False:
                command += [flag, str(value)]
        # A file, not a pipe: nobody need read it for the process to go on.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        ready = json.loads(self._line())
        self.name: str = ready["ready"]
        self.vocab_size: int = ready["vocab_size"]
        self.context: int = ready["context"]
        """Tokens that a prompt and its output may have together."""
        self._next_id = 0

    def generate(self, prompts: Prompt | Sequence[Prompt], **params: Any) -> list[Answer]:
        """Continues prompts: texts or lists of token ids; one answer for each, in their order.

        `params` are fields of `/v1/completions`, with its defaults: max_tokens (16), temperature (1), top_k,
        top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, seed, stop, stop_token_ids,
        ignore_eos, logit_bias, logprobs (K, up to the vocabulary), add_special_tokens, skip_special_tokens.
        An answer has prompt_ids, ids, text, finish_reason ("stop" or "length"), timing and, with logprobs,
        `logprobs`: for each token the K most likely ones as [id, natural logarithm], and `token_logprobs`.
        RequestError for the first request that cannot be served; the others are computed all the same.
        """
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        many = [prompts] if one else prompts
        return self._all({"prompt": p if isinstance(p, str) else list(p), **params} for p in many)  # type: ignore[arg-type]

    def chat(self, conversations: Sequence[Any], **params: Any) -> list[Answer]:
        """Answers chats: one list of messages (`{"role": ..., "content": ...}`), or a list of such lists.
        As `generate`, but max_tokens is up to the context, and there is `chat_template_kwargs`."""
        one = len(conversations) > 0 and isinstance(conversations[0], dict)
        many = [conversations] if one else conversations
        return self._all({"messages": messages, **params} for messages in many)

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._process.terminate()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _all(self, requests: Iterable[dict[str, Any]]) -> list[Answer]:
        many = list(requests)
        # Ids are never used again: a call that was interrupted leaves answers behind.
        first, self._next_id = self._next_id, self._next_id + len(many)
        lines = [_line_of({"id": first + index, **request}) for index, request in enumerate(many)]
        # Both pipes fill: one thread writes while this one reads.
        writer = threading.Thread(target=_write, args=(self._process.stdin, lines), daemon=True)
        writer.start()
        answers: dict[int, Answer] = {}
        while len(answers) < len(lines):
            answer = json.loads(self._line())
            index = answer.pop("id") - first
            if index >= 0:
                answers[index] = answer
        writer.join()
        for index in range(len(lines)):
            error = answers[index].get("error")
            if error is not None:
                raise RequestError(index, error["message"], error["param"])
        return [answers[index] for index in range(len(lines))]

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip()
            raise RuntimeFailure(said or f"tsruntime ended with exit code {code}")
        return line


def _line_of(request: dict[str, Any]) -> bytes:
    """ValueError for what JSON cannot say: NaN, half of a surrogate pair."""
    return json.dumps(request, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _write(pipe: IO[bytes], lines: list[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the reader finds out, and says why
        pipe.writelines(lines)
        pipe.flush()
