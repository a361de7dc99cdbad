"""Text as token arrays, split by file, and as batches that every process draws its own rows of."""

import functools
import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np

SEPARATOR = b"\0"  # between files: a byte that no source holds

# The standard library but for tests, tables, and what is installed beside it.
EXCLUDED = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}

# Percent of the files. Hyperparameters are tuned on "tune"; only "validation" is reported.
SPLITS = {"train": 80, "tune": 10, "validation": 10}


@dataclass(frozen=True)
class Corpus:
    """One-dimensional arrays of tokens, and how many different tokens there may be."""

    train: np.ndarray
    tune: np.ndarray
    validation: np.ndarray
    vocab_size: int


def split_of(name: str) -> str:
    """The split that a file belongs to: decided by its name alone, so the same everywhere."""
    percent = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    for split, share in SPLITS.items():
        percent -= share
        if percent < 0:
            return split
    raise AssertionError("the splits' shares add up to 100")


def stdlib_files() -> list[tuple[str, Path]]:
    """The standard library's sources by name relative to it, in order."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted((p.as_posix(), root / p) for p in files if not EXCLUDED.intersection(p.parts))


@functools.cache
def stdlib() -> Corpus:
    """The standard library of the running Python, a byte a token."""
    texts: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    for name, path in stdlib_files():
        texts[split_of(name)].append(path.read_bytes())
    tokens = {split: np.frombuffer(SEPARATOR.join(t), np.uint8) for split, t in texts.items()}
    return Corpus(**tokens, vocab_size=256)


SOURCES = {"stdlib": stdlib}


def load(name: str) -> Corpus:
    """The corpus of that name."""
    return SOURCES[name]()


class Windows:
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
    windows = grain.MapDataset.source(Windows(tokens, context)).seed(seed).shuffle().repeat()
    rows = windows.batch(batch_size // processes)
    return iter(rows[process::processes].to_iter_dataset())


def evaluation(tokens: np.ndarray, context: int, batch_size: int, count: int) -> np.ndarray:
    """`count` batches spread evenly over the text, `[count, batch_size, context + 1]`."""
    windows = Windows(tokens, context)
    chosen = np.linspace(0, len(windows) - 1, count * batch_size).astype(int)
    return np.stack([windows[i] for i in chosen]).reshape(count, batch_size, context + 1)


def bigram_loss(corpus: Corpus, tokens: np.ndarray) -> float:
    """Nats a token that the training text's pair counts, plus one each, give `tokens`."""
    size = corpus.vocab_size
    counts = np.ones((size, size))
    np.add.at(counts, (corpus.train[:-1], corpus.train[1:]), 1)
    log_probs = np.log(counts / counts.sum(axis=1, keepdims=True))
    return float(-log_probs[tokens[:-1], tokens[1:]].mean())
