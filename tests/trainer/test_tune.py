"""The command `tune`: equal tries for every optimizer, in a folder that it continues."""

import json
import shlex

import pytest

from examples.lm import tune
from examples.lm.__main__ import main
from examples.lm.config import TuneConfig
from examples.lm.loop import Result
from examples.lm.optimizers import OPTIMIZERS


@pytest.fixture
def runs(monkeypatch):
    """The points that are trained at, without training: the higher the rate the better."""
    points = []

    def trained(self, point, steps, seed, split):
        points.append(point)
        assert (steps, seed, split) == (500, 1000, "tune")
        return Result([], [], [], 1 / point["learning_rate"], steps)

    monkeypatch.setattr(tune.Sweep, "__call__", trained)
    return points


def rows_of(out):
    return [json.loads(line) for line in (out / "tuning.jsonl").read_text().splitlines()]


def test_every_optimizer_has_the_same_tries_and_none_is_made_again(runs, tmp_path, capsys):
    out = tmp_path / "tuned"
    assert main(["tune", "--out", str(out), "--tries", "12"]) == 0
    rows = rows_of(out)
    assert [row["optimizer"] for row in rows].count("adamw") == 12
    assert len(rows) == len(runs) == 3 * 12
    assert all(row["clip_norm"] == 1.0 and row["b2"] > 0 for row in rows)
    assert "best" in capsys.readouterr().out
    best = min(rows, key=lambda row: row["tune_loss"])
    assert best["learning_rate"] > max(OPTIMIZERS[best["optimizer"]].grid["learning_rate"])
    assert main(["tune", "--resume", "--out", str(out)]) == 0
    assert len(runs) == 3 * 12
    assert main(["tune", "--resume", "--out", str(out), "--tries", "13"]) == 0
    assert rows_of(out)[: 3 * 12] == rows
    assert len(runs) == 3 * 13
    kept = json.loads((out / "summary.json").read_text())["best"]
    assert {name: found["tries"] for name, found in kept.items()} == dict.fromkeys(kept, 13)
    assert main(["tune", "--resume", "--out", str(out)]) == 0
    assert json.loads((out / "summary.json").read_text())["best"] == kept
    assert main(["tune", "--resume", "--out", str(out), "--tries", "12"]) == 2
    assert "tries was 13 and is 12" in capsys.readouterr().err
    assert json.loads((out / "summary.json").read_text())["best"] == kept


@pytest.mark.parametrize("optimizer", ["adamw", "sophia_g"])
def test_the_command_that_trains_has_the_flags_that_its_optimizer_uses(optimizer):
    command = tune.training_command(TuneConfig(curvature_batch=4), optimizer, {})
    assert ("--curvature-batch 4" in command) == (optimizer == "sophia_g")


def test_fewer_tries_than_the_grid_has_points_are_said(runs, tmp_path, capsys):
    few = ["tune", "--tries", "2", "--optimizers", "adamw", "--out", str(tmp_path / "tuned")]
    assert main(few) == 0
    assert "adamw makes 8 tries: --tries 2 is less than its grid" in capsys.readouterr().out
    assert len(runs) == 8


def test_a_search_goes_on_with_its_own_text_and_sizes_only(runs, tmp_path, capsys):
    text, out = tmp_path / "my text.txt", tmp_path / "tuned"
    text.write_text("".join(f"{i} bottles of beer. " for i in range(500)))
    sizes = ["--width", "32", "--context", "64"]
    begin = ["tune", "--data", f"text:{text}", *sizes, "--optimizers", "adamw", "--tries", "3"]
    assert main([*begin, "--out", str(out)]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("Train with it")]
    command = shlex.split(line.partition(": ")[2])
    assert command[:4] == ["python", "-m", "examples.lm", "train"]
    for flag, value in {"--data": f"text:{text}", "--width": "32", "--context": "64"}.items():
        assert command[command.index(flag) + 1] == value
    assert "--learning-rate" in command
    for change in (["--width", "64"], ["--steps", "20"], ["--data", "stdlib"]):
        assert main(["tune", "--resume", "--out", str(out), *change]) == 2
        assert "holds another run" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(out)]) == 2
    assert "made by `tune`" in capsys.readouterr().err


def test_a_signal_ends_a_search_between_tries_and_it_goes_on(tmp_path, capsys, monkeypatch):
    tried = []

    def stopped(self, point, steps, seed, split):
        tried.append(point)
        return Result([], [], [], 2.0, steps if len(tried) != 3 else steps // 2)

    monkeypatch.setattr(tune.Sweep, "__call__", stopped)
    out = tmp_path / "tuned"
    assert main(["tune", "--optimizers", "adamw", "--tries", "8", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"Stopped. Continue: python -m examples.lm tune --resume --out {out}" in printed
    assert len(rows_of(out)) == 2
    assert main(["tune", "--resume", "--out", str(out)]) == 0
    assert len(rows_of(out)) == 8
    assert len(tried) == 9


def test_the_learning_rates_of_a_grid_fall_with_the_width_along_the_ladder():
    def rates(width):
        config = tune.for_optimizer(TuneConfig(width=width), "adamw")
        return tune.grid_of(tune.record.resolve(config))["learning_rate"]

    assert rates(64) == OPTIMIZERS["adamw"].grid["learning_rate"] == (8e-3, 1.5e-2)
    assert rates(16) == (8e-3, 1.5e-2)
    assert rates(640) == (8e-4, 1.5e-3)


def test_an_optimizer_without_a_grid_is_refused(tmp_path, capsys):
    out = tmp_path / "tuned"
    assert main(["tune", "--optimizers", "muon", "--out", str(out)]) == 2
    assert "muon has no grid" in capsys.readouterr().err
    assert not out.exists()
