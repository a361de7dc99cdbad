"""Text as token arrays, split by file, and as batches that every process draws its own rows of."""

import functools
import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np

from . import hosts, run_folder, stream, tokenizers
from .config import UsageError

SEPARATOR = b"\0"  # between files: a byte that no source holds

# The standard library but for tests, tables, and what is installed beside it.
EXCLUDED = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}

# Percent of the files. Hyperparameters are tuned on "tune"; only "validation" is reported.
SPLITS = {"train": 80, "tune": 10, "validation": 10}

HELD_OUT = 1 << 20  # bytes of a stream's documents that each held-out split takes, at most
SHUFFLED = 1024  # windows of a stream that are in memory and shuffled at a time

MANY_FILES = 50  # with fewer, a split could come out empty, so that each file is cut instead
GPT2_VOCABULARY = 50257

BLOCK = 1 << 20  # bytes that are looked at together
BLOCKS = 1024  # of them that are looked at, at most


@dataclass(frozen=True)
class Corpus:
    """One-dimensional arrays of tokens, and how many different tokens there may be.

    Where the training text is a stream, `train` is its beginning, and `windows`, from (context,
    process, processes), is all of it. The tokenizer of token files is known if they have a
    meta.pkl.
    """

    train: np.ndarray
    tune: np.ndarray
    validation: np.ndarray
    vocab_size: int
    windows: Callable[[int, int, int], grain.IterDataset] | None = None
    codec: tokenizers.Codec | None = None


def split_of(name: str) -> str:
    """The split that a file belongs to: decided by its name alone, so the same everywhere."""
    percent = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    for split, share in SPLITS.items():
        percent -= share
        if percent < 0:
            return split
    raise AssertionError("the splits' shares add up to 100")


def python_files(folder: str) -> list[tuple[str, Path]]:
    """The sources in one of Python's folders by name relative to it, in order."""
    root = Path(sysconfig.get_path(folder))
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted((p.as_posix(), root / p) for p in files if not EXCLUDED.intersection(p.parts))


def stdlib_files() -> list[tuple[str, Path]]:
    """The standard library's sources."""
    return python_files("stdlib")


@functools.cache
def stdlib() -> dict[str, bytes]:
    """The sources of the running Python's standard library."""
    files = stdlib_files()
    return by_file([name for name, _ in files], [path.read_bytes() for _, path in files])


@functools.cache
def packages() -> dict[str, bytes]:
    """Those, and the sources of every package installed beside it; what is there twice, once."""
    files = dict(stdlib_files() + python_files("purelib") + python_files("platlib"))
    names = {path.read_bytes(): name for name, path in reversed(files.items())}
    return by_file(list(reversed(names.values())), list(reversed(names)))


def by_file(names: Sequence[str], texts: Sequence[bytes]) -> dict[str, bytes]:
    """The splits' texts: whole files where there are many, else a part of each file."""
    parts: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    for name, text in zip(names, texts, strict=True):
        if len(names) >= MANY_FILES:
            parts[split_of(name)].append(text)
            continue
        start = 0
        for split, share in SPLITS.items():
            end = start + len(text) * share // 100
            parts[split].append(text[start:end])
            start = end
    return {split: SEPARATOR.join(part) for split, part in parts.items()}


def text_files(pattern: str) -> dict[str, bytes]:
    """The user's own files, as a path or else a glob pattern names them."""
    named = os.path.expanduser(pattern)
    if os.path.isdir(named):
        raise UsageError(f"{named} is a folder. Name its files: --data 'text:{named}/**/*.txt'.")
    found = [named] if os.path.exists(named) else sorted(glob.glob(named, recursive=True))
    paths = [Path(name) for name in found if os.path.isfile(name)]
    if not paths:
        raise UsageError(f"No file matches {pattern!r}. Check the pattern of --data text:PATTERN.")
    texts = []
    for path in paths:
        with run_folder.reading(path):
            texts.append(path.read_bytes())
    if not any(texts):
        raise UsageError(f"The files that match {pattern!r} are empty. Choose others.")
    return by_file([path.as_posix() for path in paths], texts)


def token_files(folder: str, kept: Path | None = None) -> Corpus:
    """nanoGPT's train.bin and val.bin, uint16, never read into memory as a whole.

    Their tokens are the characters of a meta.pkl, or GPT-2's.
    """
    place = Path(os.path.expanduser(folder))
    codec = tokenizers.of_token_files(place, kept)
    size = GPT2_VOCABULARY if codec is None else codec.size
    arrays = {}
    for name in ("train", "val"):
        path = place / f"{name}.bin"
        if not path.is_file():
            raise UsageError(f"There is no {path}. --data bin:FOLDER needs train.bin and val.bin.")
        if path.stat().st_size == 0 or path.stat().st_size % 2:
            raise UsageError(
                f"{path} does not hold 16-bit tokens: it has {path.stat().st_size} bytes. Write it "
                "as nanoGPT does."
            )
        with run_folder.reading(path):
            arrays[name] = np.memmap(path, np.uint16, mode="r")
        check_ids(path, arrays[name], size)
    half = len(arrays["val"]) // 2
    val = arrays["val"]
    return Corpus(arrays["train"], val[:half], val[half:], vocab_size=size, codec=codec)


def check_ids(path: Path, tokens: np.ndarray, size: int) -> None:
    """Tells the user of a token that the vocabulary does not have: its loss would be NaN."""
    for start, block in blocks(tokens):
        if block.max() >= size:
            at = int(np.argmax(block >= size))
            raise UsageError(
                f"{path} holds the token {block[at]} at position {start + at}, and the vocabulary "
                f"has {size}. Write it as nanoGPT does: with GPT-2's tokenizer, or together with a "
                "meta.pkl."
            )


def blocks(tokens: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The tokens and their positions in blocks; of more than a GiB, blocks spread over it."""
    size = BLOCK // tokens.itemsize
    starts = range(0, len(tokens), size)
    if len(starts) > BLOCKS:
        starts = [starts[i] for i in np.linspace(0, len(starts) - 1, BLOCKS).astype(int)]
    for start in starts:
        yield start, tokens[start : start + size]


def fingerprint(corpus: Corpus) -> dict[str, str]:
    """What tells one text from another: the length and a digest of each split."""
    found = {}
    for split in SPLITS:
        tokens = getattr(corpus, split)
        digest = hashlib.sha256()
        for _, block in blocks(tokens):
            digest.update(np.ascontiguousarray(block))
        found[split] = f"{len(tokens)} tokens, sha256 {digest.hexdigest()[:16]}"
    return found


def beginning(documents: Iterable[dict[str, Any]]) -> dict[str, bytes]:
    """The splits of a stream's first documents, as many as fill those that are held out.

    A document's own text decides its split, so that its copies, wherever they are, share it.
    """
    parts: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    nulls = 0
    for document in documents:
        text = stream.text_of(document)
        if text is None:
            nulls += 1
            continue
        split = split_of(text)
        if split == "train" or sizes[split] < HELD_OUT:
            parts[split].append(text.encode())
            sizes[split] += len(parts[split][-1])
        if min(sizes["tune"], sizes["validation"]) >= HELD_OUT:
            break
    if nulls:
        hosts.warn(f"{nulls} document(s) at the beginning of the stream are null, and left out.")
    return {split: SEPARATOR.join(part) for split, part in parts.items()}


def texts_of(name: str) -> dict[str, bytes]:
    """The splits of a source of text; of a stream, its beginning."""
    kind, _, place = name.partition(":")
    if kind == "text":
        return text_files(place)
    if kind == "hf" and place:
        return beginning(stream.documents(place))
    if name == "stdlib":
        return stdlib()
    if name == "packages":
        return packages()
    raise UsageError(
        f"There is no data source {name!r}. Choose stdlib, packages, text:PATTERN, bin:FOLDER or "
        "hf:NAME."
    )


def load(name: str, tokenizer: str = "bytes", kept: Path | None = None) -> Corpus:
    """The corpus that `--data` and `--tokenizer` name, with the tokenizer that a run has kept."""
    kind, _, place = name.partition(":")
    if kind == "bin":
        return token_files(place, kept)
    try:
        texts = texts_of(name)
        codec = tokenizers.find(tokenizer, lambda: texts["train"], kept)
        splits = {split: codec.encode(text) for split, text in texts.items()}
    except MemoryError:
        raise UsageError(
            f"The text of --data {name} does not fit in memory. Choose fewer files, or bin:FOLDER "
            "or hf:NAME, which are not read as a whole."
        ) from None
    if kind != "hf":
        return Corpus(**splits, vocab_size=codec.size, codec=codec)

    def windows(context: int, process: int, processes: int) -> grain.IterDataset:
        return stream.DocumentWindows(
            documents,
            lambda text: codec.encode(text + SEPARATOR),
            lambda text: split_of(text) == "train",
            context,
            process,
            processes,
        )

    documents = stream.documents(place)
    return Corpus(**splits, vocab_size=codec.size, windows=windows, codec=codec)


def check_length(corpus: Corpus, context: int) -> None:
    """Tells the user of a split that does not fill one window."""
    for split in SPLITS:
        size = len(getattr(corpus, split))
        if size <= context:
            raise UsageError(
                f"The {split} split has {size} tokens and a window takes {context + 1}. "
                "Add text, or choose a model with a shorter context."
            )


class TokenWindows:
    """Every `context + 1` tokens in a row: the inputs, and the same moved by one, the targets."""

    def __init__(self, tokens: np.ndarray, context: int):
        self.tokens, self.context = tokens, context

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, index: int) -> np.ndarray:
        start = int(index) * self.context
        return self.tokens[start : start + self.context + 1].astype(np.int32)


def batches(
    tokens: np.ndarray,
    context: int,
    batch_size: int,
    seed: int,
    process: int = 0,
    processes: int = 1,
) -> grain.DatasetIterator:
    """Shuffled windows without end, `[batch_size / processes, context + 1]` at a time.

    Whatever the number of processes, their rows one after another are the same global batch. The
    iterator's `get_state` and `set_state` continue a run at its very next batch.
    """
    windows = grain.MapDataset.source(TokenWindows(tokens, context)).seed(seed).shuffle().repeat()
    # There is no remainder, but batches of one with it would be one too many for Python to count.
    rows = windows.batch(batch_size // processes, drop_remainder=True)
    return iter(rows[process::processes].to_iter_dataset())


def training_batches(
    corpus: Corpus, context: int, batch_size: int, seed: int, process: int, processes: int
) -> grain.DatasetIterator:
    """`batches` of the corpus's training text, or of its stream.

    Each process reads its own share of a stream, so there the batches depend on how many they are.
    """
    if corpus.windows is None:
        return batches(corpus.train, context, batch_size, seed, process, processes)
    windows = grain.experimental.WindowShuffleIterDataset(
        corpus.windows(context, process, processes), window_size=SHUFFLED, seed=seed
    )
    return iter(windows.batch(batch_size // processes))


def evaluation(tokens: np.ndarray, context: int, batch_size: int, count: int) -> np.ndarray:
    """`count` batches spread evenly over the text, `[count, batch_size, context + 1]`."""
    windows = TokenWindows(tokens, context)
    chosen = np.linspace(0, len(windows) - 1, count * batch_size).astype(int)
    return np.stack([windows[i] for i in chosen]).reshape(count, batch_size, context + 1)


def bigram_loss(corpus: Corpus, tokens: np.ndarray) -> float | None:
    """Nats a token that the training text's pair counts, plus one each, give `tokens`."""
    if corpus.vocab_size > 1024:
        return None  # pairs of many tokens are too rare to count
    size = corpus.vocab_size
    counts = np.ones(size * size)
    for start in range(0, len(corpus.train) - 1, BLOCK):
        block = corpus.train[start : start + BLOCK + 1].astype(np.int64)
        counts += np.bincount(block[:-1] * size + block[1:], minlength=size * size)
    counts = counts.reshape(size, size)
    log_probs = np.log(counts / counts.sum(axis=1, keepdims=True))
    return float(-log_probs[tokens[:-1], tokens[1:]].mean())
