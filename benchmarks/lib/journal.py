"""Finished runs on disk, so that an experiment can be stopped at any moment and continued."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.lib.provenance import commit


class Journal:
    """A file of one JSON object a line: what was asked (`key`), what came out, and at which commit.

    Attributes:
      rows: its content.
    """

    def __init__(self, path: Path | None):
        self.path = path
        lines = path.read_text().splitlines() if path and path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def get(self, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The run with that key; made, and written down, where there is none."""
        for row in self.rows:
            if row["key"] == key:
                return row
        row = {"key": key, **make(), "commit": commit()}
        self.rows.append(row)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        shown = {name: row[name] for name in ("loss", "seconds") if name in row}
        print(json.dumps(key | shown), flush=True)
        return row
