"""The comparison of ways to treat rows without curvature: what is tuned, and what is reported."""

import math

from benchmarks import rare_rows
from benchmarks.lib.journal import Journal
from benchmarks.rare_rows import RareConfig, enter, summarize
from examples.lm import data

CONFIG = RareConfig(learning_rate=4e-3, tries=4, seeds=(0, 1))


def test_the_rate_is_tuned_on_the_tuning_split_and_reported_on_the_other(monkeypatch):
    best = 8e-3
    asked = []

    class Model:
        def __init__(self, config, corpus, tied, name):
            assert (config, tied, name) == (CONFIG, False, "wait")

        def run(self, rate, seed, split):
            asked.append((split, seed, rate))
            return {"loss": abs(math.log(rate / best)), "flat_of_touched": 0.5}

    monkeypatch.setattr(rare_rows, "Model", Model)
    journal = Journal(None)
    enter(CONFIG, journal, data.Corpus(*[None] * 3, 256), "wait")
    tuning = [rate for split, seed, rate in asked if (split, seed) == ("tune", 1000)]
    assert tuning[0] == CONFIG.learning_rate
    assert len(set(tuning)) == CONFIG.tries
    assert asked[CONFIG.tries :] == [("validation", 0, best), ("validation", 1, best)]
    row = {"learning_rate": best, "losses": [0.0, 0.0], "flat_of_touched": [0.5, 0.5]}
    assert summarize(journal.rows) == {"wait": row}


def test_tuning_is_not_reported_and_tied_embeddings_are_reported_apart():
    key = {"variant": "paper", "learning_rate": 0.01}
    rows = [
        {"key": {**key, "seed": 1000, "split": "tune"}, "loss": 1.0},
        {"key": {**key, "seed": 0, "split": "validation"}, "loss": 2.0, "flat_of_touched": 0.5},
        {"key": {**key, "tied": True, "seed": 1000, "split": "tune"}, "loss": 3.0},
        {"key": {**key, "tied": True, "seed": 0, "split": "validation"}, "loss": 4.0},
    ]
    row = {"learning_rate": 0.01, "losses": [2.0], "flat_of_touched": [0.5]}
    assert summarize(rows) == {"paper": row}
    row = {"learning_rate": 0.01, "losses": [4.0], "flat_of_touched": []}
    assert summarize(rows, tied=True) == {"paper": row}
