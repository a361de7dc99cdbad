"""Hugging Face datasets, streamed: documents to windows of tokens, from any saved place on."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from .config import UsageError

COLUMN = "text"


def documents(name: str) -> Any:
    """The training split of "NAME" or "NAME:CONFIG", a hub's name or a local folder, streamed."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise UsageError(
            "--data hf:NAME needs the package datasets. Install it: pip install 'datasets>=3.2'."
        ) from error
    path, _, config = name.partition(":")
    try:
        dataset = datasets.load_dataset(path, config or None, split="train", streaming=True)
        columns = next(iter(dataset)).keys()
    except Exception as error:  # whatever the hub, the network or a file's reader raise
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise UsageError(
            f"The dataset {name!r} cannot be loaded ({type(error).__name__}: {reason}). Check the "
            "name, and that it has documents in a split 'train'."
        ) from error
    if COLUMN not in columns:
        raise UsageError(
            f"The dataset {name!r} has no column {COLUMN!r} but {', '.join(columns)}. Rename one."
        )
    return dataset


def text_of(document: dict[str, Any]) -> str | None:
    """A document's text, if it has one.

    Raises:
      UsageError: it has something else.
    """
    text = document.get(COLUMN)
    if text is None or isinstance(text, str):
        return text
    raise UsageError(
        f"A document's {COLUMN!r} is of type {type(text).__name__} ({str(text)[:40]!r}). "
        "Make it a string, or null to leave the document out."
    )


class Reader(grain.DatasetIterator):
    """Every `context + 1` tokens of the documents, one after another, epoch after epoch.

    Its state is the dataset's own before the document that is being cut, what earlier documents
    left over, and how many windows the two have given since.
    """

    def __init__(self, stream: "DocumentWindows"):
        super().__init__()
        self.stream = stream
        self._open(None)
        self.place = self.dataset.state_dict()
        self.left_over = self.tokens = np.zeros(0, np.int32)
        self.taken = 0

    def __next__(self) -> np.ndarray:
        context = self.stream.context
        while len(self.tokens) <= (self.taken + 1) * context:
            self.left_over, self.taken = self.tokens[self.taken * context :], 0
            self.place = self.dataset.state_dict()
            self._append_document()
        start = self.taken * context
        self.taken += 1
        return self.tokens[start : start + context + 1]

    def get_state(self) -> dict[str, Any]:
        return {
            "reader": [self.stream.process, self.stream.processes],
            "place": self.place,
            "left_over": self.left_over.tolist(),
            "taken": self.taken,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        if state["reader"] != [self.stream.process, self.stream.processes]:
            raise UsageError(
                f"The stream was read by {state['reader'][1]} process(es) and now there are "
                f"{self.stream.processes}. Resume with as many as before."
            )
        self._open(state["place"])
        self.place, self.taken = state["place"], state["taken"]
        self.left_over = self.tokens = np.array(state["left_over"], np.int32)
        if self.taken:
            self._append_document()

    def _open(self, place: dict[str, Any] | None) -> None:
        self.dataset = self.stream.shard()
        if place is not None:
            self.dataset.load_state_dict(place)
        self.documents: Iterator[dict[str, Any]] = iter(self.dataset)

    def _append_document(self) -> None:
        for _ in range(2):
            for document in self.documents:
                text = text_of(document)
                if text is not None and self.stream.keep(text):
                    tokens = self.stream.encode(text.encode())
                    self.tokens = np.concatenate([self.left_over, tokens.astype(np.int32)])
                    return
            self._open(None)
        raise UsageError("A process's share of the dataset holds no document to train on.")


class DocumentWindows(grain.IterDataset):
    """The windows of one process's share of a dataset.

    Args:
      dataset: from `documents`.
      encode: a document's bytes to its tokens.
      keep: whether a document's text is for training.
      context: a window's tokens, but for the last one's target.
      process: which share this is.
      processes: how many there are.
    """

    def __init__(
        self,
        dataset: Any,
        encode: Callable[[bytes], np.ndarray],
        keep: Callable[[str], bool],
        context: int,
        process: int,
        processes: int,
    ):
        super().__init__()
        self.dataset, self.encode, self.keep = dataset, encode, keep
        self.context, self.process, self.processes = context, process, processes

    def __iter__(self) -> Reader:
        return Reader(self)

    def shard(self) -> Any:
        """This process's documents from the first one on: whole files where they divide evenly."""
        split = importlib.import_module("datasets.distributed").split_dataset_by_node
        return split(self.dataset, self.process, self.processes)
