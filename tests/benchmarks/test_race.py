"""The race: its entrants, its search, and the runs that its journal has already."""

import math

import pytest

from benchmarks.entrants import ENTRANTS
from benchmarks.lib import timing
from benchmarks.lib.journal import Journal
from benchmarks.lib.provenance import RESULTS
from benchmarks.lib.sweep import TUNING_SEED, Runs, Workload, compiled
from benchmarks.lm_race import REGIMES, finished
from examples.lm import data
from examples.lm.optimizers import OPTIMIZERS
from examples.lm.tune import LADDERS, neighbours, search
from tests.trainer.worker import MICRO, quick_compilation

JOURNAL = Journal(RESULTS / "lm_race.jsonl")
FINISHED = [(r, n) for r in REGIMES for n in ENTRANTS if finished(JOURNAL, r, n)]


def test_every_row_of_the_trainer_that_has_a_grid_races():
    assert {name for name, row in OPTIMIZERS.items() if row.grid} <= set(ENTRANTS)


@pytest.mark.parametrize("name", ENTRANTS)
def test_a_grid_is_on_the_ladders(name):
    for hyperparameter, values in ENTRANTS[name].grid.items():
        assert set(values) <= set(LADDERS[hyperparameter])


def test_most_of_the_race_is_in_the_journal():
    assert len(FINISHED) >= 20


@pytest.mark.parametrize(("regime", "name"), FINISHED)
def test_a_finished_entrant_is_read_from_the_journal_without_another_run(regime, name, monkeypatch):
    def compiles(run):
        raise AssertionError("a run of the journal was not recognised")

    setup = REGIMES[regime]
    run = setup.workload.run(ENTRANTS[name])
    runs = Runs(JOURNAL, None, run, make=compiles, regime=regime, entrant=name)
    tune = [setup.steps, TUNING_SEED, "tune"]
    found = setup.search(name, lambda point: runs(point, *tune)["loss"])
    for budget in setup.budgets:
        for seed in setup.seeds:
            assert runs(found["point"], budget, seed, "validation")["loss"] > 0


def test_an_optimum_beyond_the_grid_is_found():
    def loss_of(point):
        return abs(math.log(point["learning_rate"] / 4e-2)) + abs(point["b1"] - 0.7)

    grid = {"learning_rate": (1e-3, 2e-3), "b1": (0.8, 0.9)}
    found = search(grid, 40, loss_of)
    assert found["point"] == {"learning_rate": 4e-2, "b1": 0.7}
    assert found["open"] == []
    short = search(grid, 6, loss_of)
    assert short["tries"] == 6
    assert "learning_rate" in short["open"]


def test_a_run_that_diverges_is_never_the_best():
    grid = {"gamma": (0.05, 0.1)}
    found = search(grid, 6, lambda p: math.nan if p["gamma"] < 0.1 else p["gamma"])
    assert found["point"] == {"gamma": 0.1}


def test_neighbours_are_one_value_away_in_one_hyperparameter():
    point = {"b1": 0.98, "gamma": 0.02}
    expected = [{"b1": 0.965, "gamma": 0.02}, {"b1": 0.98, "gamma": 0.05}]
    assert list(neighbours(point)) == [*expected, {"b1": 0.98, "gamma": 0.01}]


@pytest.fixture
def quick(tmp_path):
    with quick_compilation(tmp_path / "compiled"):
        yield


def test_a_sweeps_run_is_kept_and_not_made_again(quick, tmp_path):
    workload = Workload(MICRO, batch_size=2, curvature_batch=1)
    corpus = data.load("stdlib")
    path = tmp_path / "runs.jsonl"
    arguments = {"learning_rate": 4e-3}, 12, 0, "tune"
    runs = Runs(Journal(path), corpus, workload.run("sophia_g"), name="first")
    made = runs(*arguments)
    assert len(made["win_rates"]) == len(made["gammas"]) == 2
    assert made["training"][0] > made["loss"] > 0
    again = Runs(Journal(path), corpus, workload.run("sophia_g"), make=None, name="first")
    assert again(*arguments) == made


def test_times_are_medians_of_the_ratios_to_adamw_in_the_same_round():
    adamw, other = iter([9.0, 1.0, 2.0, 4.0]), iter([9.0, 3.0, 4.0, 4.0])  # the first compiles
    rows = timing.over_adamw({"adamw": lambda: next(adamw), "other": lambda: next(other)}, 3)
    assert rows["other"] == {"seconds": [3.0, 4.0, 4.0], "over_adamw": 2.0}


def test_the_time_of_a_step_is_that_of_an_interval_with_its_estimate(quick):
    workload = Workload(MICRO, batch_size=2, curvature_batch=1, update_interval=2)
    trainer = compiled(workload.run("adamw"))
    assert timing.mean_step(trainer, data.load("stdlib"))() > 0
