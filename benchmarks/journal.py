"""Finished runs on disk, so that an experiment can be stopped at any moment and continued."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.runner import Outcome, Runner
from examples.lm.data import Corpus


class Journal:
    """A file of one JSON object a line: what was asked (`key`), and what came out.

    Attributes:
      rows: its content.
    """

    def __init__(self, path: Path | None):
        self.path = path
        lines = path.read_text().splitlines() if path and path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def get(self, key: dict[str, Any], make: Callable[[], Outcome]) -> dict[str, Any]:
        """The run with that key; made, and written down, where there is none."""
        for row in self.rows:
            if row["key"] == key:
                return row
        row = {"key": key, **dataclasses.asdict(make())}
        self.rows.append(row)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        print(json.dumps({**key, "loss": row["loss"], "seconds": row["seconds"]}), flush=True)
        return row


class Runs:
    """The runs of one optimizer on one setting, each made once and then read from the journal."""

    def __init__(self, journal: Journal, corpus: Corpus, make: Callable[[], Runner], **names: str):
        self.journal, self.corpus, self.make, self.names = journal, corpus, make, names
        self.runner: Runner | None = None

    def __call__(
        self, point: dict[str, float], steps: int, seed: int, split: str
    ) -> dict[str, Any]:
        """The run at a point; the optimizer is compiled when the first run is missing."""
        key = {**self.names, "steps": steps, "seed": seed, "split": split, **point}

        def train() -> Outcome:
            self.runner = self.runner or self.make()
            return self.runner.run(self.corpus, steps, seed, split, **point)

        return self.journal.get(key, train)
