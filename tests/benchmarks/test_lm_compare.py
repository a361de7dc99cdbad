"""What `benchmarks.lm_compare` runs and tabulates."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import lm_compare


def finish(folder: Path) -> None:
    """Writes what a comparison leaves behind."""
    (folder / "summary.json").write_text('{"runs": {}}')
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of each comparison that is started; it ends at once."""
    started: list[list[str]] = []

    def finish_at_once(command: list[str], check: bool) -> None:
        started.append(command[3:])
        finish(Path(command[command.index("--out") + 1]))

    monkeypatch.setattr(subprocess, "run", finish_at_once)
    return started


def test_an_interrupted_seed_goes_on_and_a_finished_one_is_not_run_again(
    tmp_path: Path, commands: list[list[str]]
) -> None:
    found = lm_compare.run(tmp_path, 3, ["--steps", "20"])
    assert found == ({"runs": {}}, [{"step": 1}])
    assert commands == [["compare", "--out", str(tmp_path), "--seed", "3", "--steps", "20"]]

    assert lm_compare.run(tmp_path, 3, ["--steps", "20"]) == found
    assert len(commands) == 1

    (tmp_path / "summary.json").unlink()
    (tmp_path / "run.json").write_text("{}")
    assert lm_compare.run(tmp_path, 3, ["--steps", "20"]) == found
    assert commands[1] == ["compare", "--out", str(tmp_path), "--resume"]


def test_the_table_compares_step_times_within_a_run() -> None:
    def summary(adamw: float, sophia: float) -> dict[str, Any]:
        row = {"steps": 9, "validation_loss": 2.0, "curvature_share": 0.1, "win_rate": None}
        return {
            "runs": {
                "adamw": {**row, "step_seconds": adamw},
                "sophia_g": {**row, "step_seconds": sophia, "win_rate": 0.5},
            }
        }

    table = lm_compare.table([summary(1, 2), summary(10, 15), summary(100, 110)])
    assert table["sophia_g"]["step_time_over_adamw"] == 1.5
    assert table["sophia_g"]["win_rate"] == 0.5
    assert table["adamw"]["win_rate"] is None
    json.dumps(table)
