"""Text to tokens: bytes, byte pairs learnt from the text, or GPT-2's."""

import contextlib
import hashlib
import importlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from . import meta, run_folder
from .config import UsageError

PIECE = 1 << 16  # bytes of text that are tokenized as one
PIECES = 256  # of them handed to a tokenizer at a time, which needs many times their memory
LEARN_FROM = 1 << 25  # bytes of text that byte pairs are learnt from, at most


def cache_folder() -> Path:
    """Where learnt tokenizers are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sophia_optax"


@dataclass(frozen=True)
class Codec:
    """A tokenizer: text to tokens and back.

    Attributes:
      encode: bytes of text to an array of tokens.
      decode: tokens to text.
      size: how many different tokens there are.
      learnt: what a run keeps of it: what was learnt from the text, as the package `tokenizers`
        writes it, or the characters that are the tokens.
    """

    encode: Callable[[bytes], np.ndarray]
    decode: Callable[[list[int]], str]
    size: int
    learnt: str | None = None


def find(name: str, text: Callable[[], bytes], kept: Path | None = None) -> Codec:
    """The tokenizer of that name; "bpe:SIZE" is learnt from the text, unless it was `kept`."""
    if name == "bytes":
        return Codec(
            lambda text: np.frombuffer(text, np.uint8),
            # A model may have more tokens than there are bytes; 255 is in no UTF-8.
            lambda tokens: bytes(min(t, 255) for t in tokens).decode(errors="replace"),
            256,
        )
    kind, _, size = name.partition(":")
    if kind == "bpe" and size.isdigit() and 256 < int(size) <= 65536:
        if kept is not None and kept.exists():
            return codec(read(kept))
        return codec(byte_pairs(int(size), text()))
    if name == "gpt2":
        return gpt2()
    raise UsageError(
        f"There is no tokenizer {name!r}. Choose bytes, bpe:SIZE (257 to 65536) or gpt2."
    )


def of_token_files(folder: Path, kept: Path | None = None) -> Codec | None:
    """The characters that nanoGPT's meta.pkl lists; None without that file, which GPT-2's lack.

    Args:
      folder: of train.bin and val.bin.
      kept: where a run that goes on has kept them; runs from before that have no such file.

    Raises:
      UsageError: a file is damaged, or holds something else.
    """
    if kept is not None and kept.exists():
        found = run_folder.read_json(kept).get("characters")
        if not isinstance(found, list) or not meta.are_characters(found):
            raise UsageError(f"{kept} holds no list of characters. Restore it from a copy.")
        return characters(found)
    path = folder / meta.NAME
    return None if kept is not None or not path.exists() else characters(meta.read(path))


def characters(found: list[str]) -> Codec:
    """Characters as tokens."""
    tokens = {character: token for token, character in enumerate(found)}

    def encode(text: bytes) -> np.ndarray:
        wanted = text.decode(errors="replace")
        unknown = set(wanted) - tokens.keys()
        if unknown:
            raise UsageError(
                f"The vocabulary of {len(found)} characters lacks {min(unknown)!r}. Leave it out."
            )
        return np.array([tokens[c] for c in wanted], np.uint16)

    def decode(numbers: list[int]) -> str:
        # A model may have more tokens than there are characters.
        return "".join(found[n] if n < len(found) else "\ufffd" for n in numbers)

    learnt = json.dumps({"characters": found})
    return Codec(encode, decode, len(found), learnt)


def read(path: Path) -> Tokenizer:
    """What was learnt before.

    Raises:
      UsageError: the file is damaged.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing more precise
        raise UsageError(
            f"The tokenizer in {path} cannot be read ({error}). Restore it from a copy."
        ) from error


def pieces(text: bytes) -> list[str]:
    """The text in parts of bounded size; bytes that are no UTF-8 become replacement characters."""
    parts = (text[i : i + PIECE] for i in range(0, len(text), PIECE))
    return [part.decode(errors="replace") for part in parts]


def byte_pairs(size: int, text: bytes) -> Tokenizer:
    """A byte-level BPE learnt from the text, or from the cache if it was learnt before."""
    digest = hashlib.sha256(text).hexdigest()[:16]
    path = cache_folder() / f"bpe-{size}-{digest}.json"
    with contextlib.suppress(UsageError):  # not there, or torn: it is learnt again
        return read(path)
    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(
        pieces(text[:LEARN_FROM]), vocab_size=size, min_frequency=2, show_progress=False
    )
    tokenizer = Tokenizer.from_str(learner.to_str())
    with contextlib.suppress(OSError, UsageError):  # without a cache it is learnt each time
        path.parent.mkdir(parents=True, exist_ok=True)
        run_folder.replace(path, lambda unfinished: unfinished.write_text(tokenizer.to_str()))
    return tokenizer


def codec(tokenizer: Tokenizer) -> Codec:
    """A learnt tokenizer, handed the text in parts."""

    def encode(text: bytes) -> np.ndarray:
        parts, ids = pieces(text), [np.zeros(0, np.uint16)]
        for i in range(0, len(parts), PIECES):
            batch = tokenizer.encode_batch_fast(parts[i : i + PIECES], add_special_tokens=False)
            ids.extend(np.array(part.ids, np.uint16) for part in batch)
        return np.concatenate(ids)

    return Codec(encode, tokenizer.decode, tokenizer.get_vocab_size(), tokenizer.to_str())


def gpt2() -> Codec:
    """GPT-2's byte pairs, by way of tiktoken and its cache."""
    try:
        encoding = importlib.import_module("tiktoken").get_encoding("gpt2")
    except Exception as error:
        raise UsageError(
            f"GPT-2's tokenizer is not at hand ({type(error).__name__}). Install tiktoken and let "
            "it fetch the vocabulary once, or choose --tokenizer bpe:50257."
        ) from error

    def encode(text: bytes) -> np.ndarray:
        batches = encoding.encode_ordinary_batch(pieces(text))
        return np.concatenate([np.zeros(0, np.uint16), *(np.array(i, np.uint16) for i in batches)])

    return Codec(encode, encoding.decode, encoding.n_vocab)
