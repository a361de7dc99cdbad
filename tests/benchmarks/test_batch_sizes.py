"""The study of the batch size: what is tuned, and what is reported."""

import dataclasses
import math

import pytest

from benchmarks import batch_sizes
from benchmarks.batch_sizes import BatchSizesConfig, enter, summarize, workload
from benchmarks.lib.journal import Journal
from examples.lm import data

CONFIG = BatchSizesConfig(tries=3, seeds=(0, 1), steps=125)


@pytest.mark.parametrize(("batch", "part"), [(2, 2), (8, 4), (64, 8), (512, 64)])
def test_an_eighth_of_the_batch_estimates_the_curvature_and_four_sequences_at_least(batch, part):
    assert workload(batch).curvature_batch == part
    assert dataclasses.replace(workload(64), batch_size=8, curvature_batch=4) == workload(8)


def test_the_rate_is_tuned_on_the_tuning_split_and_reported_on_the_other(monkeypatch):
    start = batch_sizes.raced("large", "adamw")["point"]
    best = 1.5 * start["learning_rate"]
    asked = []

    class Runs:
        def __init__(self, journal, corpus, run, **names):
            assert names == {"batch": "32", "entrant": "adamw"}
            assert run.config.batch_size == 32

        def __call__(self, point, steps, seed, split):
            assert steps == 125
            assert {**point, "learning_rate": 0} == {**start, "learning_rate": 0}
            asked.append((split, seed, point["learning_rate"]))
            return {"loss": abs(math.log(point["learning_rate"] / best))}

    monkeypatch.setattr(batch_sizes, "Runs", Runs)
    enter(CONFIG, Journal(None), data.Corpus(*[None] * 3, 256), 32, "adamw")
    tuning = [rate for split, seed, rate in asked if (split, seed) == ("tune", 1000)]
    assert len(tuning) == CONFIG.tries
    assert [(split, seed) for split, seed, _ in asked[CONFIG.tries :]] == [
        ("validation", 0),
        ("validation", 1),
    ]
    closest = min(tuning, key=lambda rate: abs(math.log(rate / best)))
    assert {rate for split, _, rate in asked if split == "validation"} == {closest}


def test_a_run_that_diverged_has_no_loss():
    key = {"entrant": "soap", "batch": "8", "learning_rate": 0.01}
    rows = [
        {"key": {**key, "split": "tune"}, "loss": 1.0},
        {"key": {**key, "split": "validation"}, "loss": 2.0},
        {"key": {**key, "split": "validation"}, "loss": math.nan},
    ]
    assert summarize(rows) == {"soap": {"8": {"learning_rate": 0.01, "losses": [2.0, None]}}}


def test_other_parts_of_the_batch_run_at_the_tuned_rate_and_are_reported_apart(monkeypatch):
    made = {}

    class Runs:
        def __init__(self, journal, corpus, run, *, batch, entrant, curvature):
            assert (batch, entrant) == ("32", "sophia_g_eigenbasis")
            interval = run.hyperparameters.update_interval
            made[curvature] = run.config.curvature_batch, interval
            self.journal, self.names = journal, {"batch": batch, "entrant": entrant}
            self.names["curvature"] = curvature

        def __call__(self, point, steps, seed, split):
            key = {**self.names, "seed": seed, "split": split, **point}
            self.journal.get(key, lambda: {"loss": 1.0})

    monkeypatch.setattr(batch_sizes, "Runs", Runs)
    journal = Journal(None)
    key = {"entrant": "sophia_g_eigenbasis", "batch": "32", "split": "validation"}
    journal.get({**key, "learning_rate": 0.5}, lambda: {"loss": 2.0})
    batch_sizes.vary_curvature(CONFIG, journal, data.Corpus(*[None] * 3, 256), 32)
    assert made == {
        "whole batch": (32, 10),
        "each step": (4, 1),
        "whole batch, each step": (32, 1),
    }
    of_row = {"learning_rate": 0.5, "losses": [2.0]}
    assert summarize(journal.rows) == {"sophia_g_eigenbasis": {"32": of_row}}
    for name in made:
        found = summarize(journal.rows, name)["sophia_g_eigenbasis"]["32"]
        assert found == {"learning_rate": 0.5, "losses": [1.0, 1.0]}
