"""The command `tune`: equal tries for every optimizer, and a file that it continues."""

import json

import pytest

from examples.lm import tune
from examples.lm.__main__ import main
from examples.lm.loop import Result
from examples.lm.optimizers import OPTIMIZERS


@pytest.fixture
def runs(monkeypatch):
    """The points that are trained at, without training: the higher the rate the better."""
    points = []

    def trained(self, point, steps, seed, split):
        points.append(point)
        assert (steps, seed, split) == (500, 1000, "tune")
        return Result([], [], [], 1 / point["learning_rate"])

    monkeypatch.setattr(tune.Sweep, "__call__", trained)
    return points


def test_every_optimizer_has_the_same_tries_and_none_is_made_again(runs, tmp_path, capsys):
    path = tmp_path / "tuning.jsonl"
    arguments = ["tune", "--results", str(path), "--tries", "12"]
    assert main(arguments) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["optimizer"] for row in rows].count("adamw") == 12
    assert len(rows) == len(runs) == 3 * 12
    assert all(row["clip_norm"] == 1.0 and row["b2"] > 0 for row in rows)
    assert "best" in capsys.readouterr().out
    assert main(arguments) == 0
    assert len(runs) == 3 * 12
    best = min(rows, key=lambda row: row["tune_loss"])
    assert best["learning_rate"] > max(OPTIMIZERS[best["optimizer"]].grid["learning_rate"])


def test_an_optimizer_without_a_grid_is_refused(tmp_path, capsys):
    path = tmp_path / "tuning.jsonl"
    assert main(["tune", "--optimizers", "muon", "--results", str(path)]) == 2
    assert "muon has no grid" in capsys.readouterr().err
    assert not path.exists()
