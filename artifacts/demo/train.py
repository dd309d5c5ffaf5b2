"""Trains the demo checkpoint of this folder from nothing, on the sources of Python's standard library.

    python train.py --work-dir DIR [--out DIR] [--minutes 70]  trains, or goes on where DIR's checkpoint ends
    python train.py --work-dir DIR --export-only               writes the checkpoint as it stands

The learning rate follows the time spent training, so a run always ends annealed, however busy the machine.
Text and batches depend on the seed alone; how many batches fit into the time does not.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from data import VOCAB_SIZE, Corpus, documents, is_validation, train_tokenizer
from export import export, samples
from model import Config, Model
from tokenizers import Tokenizer
from torch import Tensor

WARMUP_STEPS = 60
FINAL_LR = 0.02  # of the peak
VALIDATION_WINDOWS = 48


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--work-dir", type=Path, required=True, help="training state and log; outside the repository"
    )
    p.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the checkpoint is written")
    p.add_argument("--minutes", type=float, default=70, help="training time in all, resumed runs included")
    p.add_argument("--save-minutes", type=float, default=4, help="between training checkpoints")
    p.add_argument("--rows", type=int, default=8, help="sequences a batch")
    p.add_argument("--length", type=int, default=512, help="tokens a sequence")
    p.add_argument("--chat-share", type=float, default=0.15, help="part of the sequences that are dialogues")
    p.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of embedding and norms")
    p.add_argument("--matrix-lr", type=float, default=4e-3, help="peak learning rate of the matrices")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--threads", type=int, default=2, help="at most; one is used while that is faster")
    p.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    p.add_argument("--export-only", action="store_true")
    return p.parse_args()


class Threads:
    """On a busy machine many threads in lockstep can be slower than one: keeps to what was faster last."""

    def __init__(self, most: int) -> None:
        self.seconds = {most: 0.0} | ({1: math.inf} if most > 1 else {})

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Runs one step with the better count, or, once in 40 steps, with the other, and times it."""
        best = min(self.seconds, key=lambda n: self.seconds[n])
        other = next((n for n in self.seconds if n != best), best)
        count = other if number % 40 == 39 else best
        torch.set_num_threads(count)
        begun = time.monotonic()
        yield
        self.seconds[count] = time.monotonic() - begun


class Trainer:
    """Model, optimizer and what it takes to go on after an interruption."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.path = args.work_dir / "training.pt"
        self.model = Model(Config(vocab_size=VOCAB_SIZE))
        matrices = [p for p in self.model.model.layers.parameters() if p.dim() == 2]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [
            {"params": [self.model.model.embed_tokens.weight], "weight_decay": 0.01},
            {"params": vectors, "weight_decay": 0.0},
        ]
        # Muon makes more of each batch, and the text is short: kellerjordan.github.io/posts/muon, 2024
        self.optimizers = (
            torch.optim.Muon(
                matrices, lr=args.matrix_lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True),
        )
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []

    def load(self) -> None:
        if not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
        }
        partial = self.path.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self.path)

    @property
    def progress(self) -> float:
        return min(1.0, self.seconds / (60 * self.args.minutes))

    def set_rate(self) -> None:
        """Linear warm-up over steps, then a cosine over time."""
        cosine = FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * self.progress))
        share = min(1.0, (self.step + 1) / WARMUP_STEPS) * cosine
        for optimizer, peak in zip(self.optimizers, (self.args.matrix_lr, self.args.lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * share

    def update(self) -> None:
        self.set_rate()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1


def loss_function(model: Model, compiled: bool) -> Any:
    """ids [B, T + 1] -> mean cross-entropy, nats a token; matrix products in bf16."""

    def loss(ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    return torch.compile(loss) if compiled else loss


@torch.no_grad()
def validate(loss: Any, windows: Tensor, rows: int) -> float:
    """Mean loss over ids [N, T + 1], nats a token; N is a multiple of rows."""
    return sum(loss(chunk).item() for chunk in windows.split(rows)) / (len(windows) // rows)


def train(trainer: Trainer, corpus: Corpus) -> None:
    args = trainer.args
    loss_of = loss_function(trainer.model, not args.no_compile)
    held_out = torch.from_numpy(corpus.validation(VALIDATION_WINDOWS // args.rows * args.rows))
    threads = Threads(args.threads)
    running, last_save = 0.0, trainer.seconds
    print(
        f"{sum(p.numel() for p in trainer.model.parameters())} parameters; {json.dumps(corpus.sizes)}",
        flush=True,
    )
    begun = time.monotonic() - trainer.seconds
    while trainer.progress < 1:
        with threads.step(trainer.step):
            loss = loss_of(torch.from_numpy(corpus.batch(trainer.step, args.rows)))
            loss.backward()
            trainer.update()
        running = loss.item() if running == 0 else 0.98 * running + 0.02 * loss.item()
        trainer.seconds = time.monotonic() - begun
        done = trainer.progress >= 1
        if trainer.step % 50 == 0:
            tokens = trainer.step * args.rows * args.length
            print(
                f"step {trainer.step}  {tokens / 1e6:.2f} M tokens  loss {running:.3f}  "
                f"{tokens / trainer.seconds:.0f} tokens/s  {trainer.seconds / 60:.1f} min, "
                f"{args.minutes - trainer.seconds / 60:.1f} to go",
                flush=True,
            )
        if done or trainer.seconds - last_save >= 60 * args.save_minutes:
            last_save = trainer.seconds
            value = validate(loss_of, held_out, args.rows)
            entry = {
                "step": trainer.step,
                "minutes": trainer.seconds / 60,
                "train": running,
                "validation": value,
            }
            trainer.history.append(entry)
            trainer.save()
            print("saved", json.dumps({k: round(v, 4) for k, v in entry.items()}), flush=True)


def report(trainer: Trainer, corpus: Corpus) -> dict[str, Any]:
    """The figures of the README, measured over every held-out token with the weights as they stand."""
    windows = torch.from_numpy(corpus.validation(1 << 30))
    nats = validate(loss_function(trainer.model, False), windows, 1)
    bytes_a_token = corpus.valid_bytes / len(corpus.valid)
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "minutes": round(trainer.seconds / 60, 1),
        "steps": trainer.step,
        "tokens_seen": trainer.step * trainer.args.rows * trainer.args.length,
        "corpus": corpus.sizes,
        "validation_nats_per_token": round(nats, 4),
        "validation_bits_per_byte": round(nats / math.log(2) / bytes_a_token, 4),
        "history": [{k: round(v, 4) for k, v in entry.items()} for entry in trainer.history],
    }


def main() -> None:
    args = arguments()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    vocabulary = args.work_dir / "tokenizer.json"
    if not vocabulary.exists():
        train_tokenizer([t for p, t in documents().items() if not is_validation(p)]).save(str(vocabulary))
    tokenizer = Tokenizer.from_file(str(vocabulary))
    trainer = Trainer(args)
    trainer.load()
    corpus = Corpus(tokenizer, args.seed, args.length, args.chat_share)
    if not args.export_only:
        train(trainer, corpus)
    export(trainer.model, tokenizer, args.out)
    figures = report(trainer, corpus) | {"samples": samples(args.out)}
    text = json.dumps(figures, indent=1)
    (args.work_dir / "report.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
