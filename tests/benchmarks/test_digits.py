"""The race of the digits and of their captions."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import digits
from examples import vision


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(vision, "WIDTH", 8)
    monkeypatch.setattr(vision, "BLOCKS", 1)


def first_point(name):
    return {key: values[0] for key, values in digits.ENTRANTS[name].grid.items()}


@pytest.mark.parametrize("name", digits.ENTRANTS)
def test_every_entrant_trains_at_traced_hyperparameters(tiny, name):
    run = digits.compiled(vision.classes(), digits.ENTRANTS[name], vision.digits(), 20)
    shapes = jax.eval_shape(run, first_point(name), 0)
    assert shapes["test"]["accuracy"].shape == ()
    assert ("win_rate" in shapes) == name.startswith("sophia")


def test_the_hyperparameters_of_a_run_are_those_of_its_point(tiny):
    row = digits.ENTRANTS["sophia_g"]
    run = digits.compiled(vision.classes(), row, vision.digits(), 20)
    point = first_point("sophia_g")
    ends = [float(run({**point, **other}, 0)["test"]["loss"]) for other in ({}, {"gamma": 0.5})]
    assert ends[0] != ends[1]
    assert run._cache_size() == 1


def test_all_get_more_tries_while_one_can_still_climb_and_the_report_is_written(
    monkeypatch, tmp_path, capsys
):
    runs = []

    def compiled(task, row, splits, steps):
        def run(point, seed):
            runs.append(point)
            loss = jnp.float32(1 / point["learning_rate"] + seed / 1e4)  # the higher the better
            rates = {"win_rate": jnp.ones(2)} if "gamma" in point else {}
            scores = {"loss": loss, "accuracy": jnp.float32(0.5)}
            return {"training": jnp.ones(2), **rates, "tune": scores, "test": scores}

        return run

    monkeypatch.setattr(digits, "compiled", compiled)
    monkeypatch.setattr(digits, "TASKS", {"classes": lambda: None})
    config = digits.DigitsConfig(
        tasks=("classes",), optimizers=("adamw", "sophia_g"), tries=9, seeds=(0, 1), out=tmp_path
    )
    digits.main(config)
    assert "sophia_g" in capsys.readouterr().out
    written = json.loads((tmp_path / "vision.json").read_text())
    assert {"command", "commit", "versions", "settings", "results"} <= set(written)
    for row in written["results"]["classes"].values():
        assert row["tuning"]["tries"] == 17
        assert row["tuning"]["open"]
        assert [run["seed"] for run in row["runs"]] == [0, 1]
    assert (tmp_path / "vision.png").stat().st_size > 0
    # Started again, it finds all runs in the journal.
    made = len(runs)
    digits.main(config)
    assert len(runs) == made
    assert json.loads((tmp_path / "vision.json").read_text())["results"] == written["results"]


def test_an_entrant_has_the_basis_of_the_trainers_row():
    found = {name for name, row in digits.ENTRANTS.items() if row.eigenbasis}
    assert found == {"sophia_g_eigenbasis", "soap"}
