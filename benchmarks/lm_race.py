"""How many steps each optimizer needs to reach the loss of a tuned AdamW.

    python -m benchmarks.lm_race [--quick] [--regimes small large] [--tables-only]

Every entrant is tuned with the same number of tries (`entrants.py`) on the `tune` split and a seed
of its own. Then its best point is run at several budgets, each with its own full decay of the
learning rate, on other seeds, and judged on the `validation` split. Runs are appended to
`results/lm_race.jsonl` as they end, and what is there is not run again, so that the race can be
stopped and continued; `results/lm_race.json` holds the tables and `lm_race.png` the plot. A step's
seconds are measured for the tables, all entrants in turn, so let nothing else run then.
"""

import dataclasses
import functools
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks import race_table
from benchmarks.entrants import ENTRANTS, LADDERS, search
from benchmarks.journal import Journal, Runs
from benchmarks.provenance import RESULTS, provenance
from benchmarks.runner import Runner, Setting
from examples.lm import data


@dataclass(frozen=True)
class Regime:
    """A setting, its tuning budget and the budgets that are raced.

    Attributes:
      setting: model and batches.
      steps: of a tuning run.
      budgets: steps of the raced runs, each with a full decay.
      tries: points that each entrant may try.
      seeds: of the raced runs; tuning uses another.
    """

    setting: Setting
    steps: int
    budgets: tuple[int, ...]
    tries: int = 16
    seeds: tuple[int, ...] = (0, 1, 2)


REGIMES = {
    "small": Regime(Setting(batch_size=8, curvature_batch=4), 500, (250, 500, 1000)),
    "large": Regime(Setting(batch_size=64, curvature_batch=8), 125, (63, 125, 250), tries=12),
}
QUICK = Regime(Setting(batch_size=2, curvature_batch=1), 10, (5, 10), tries=2, seeds=(0,))
TUNING_SEED = 1000


@dataclass(frozen=True)
class RaceConfig:
    """What to race.

    Attributes:
      regimes: names in `REGIMES`, to run.
      entrants: names in `ENTRANTS`, to run.
      quick: a few steps of each, to see that it runs; writes no results.
      runs: the file of finished runs.
      tune_only: stop after tuning.
      tables_only: run nothing; tabulate the entrants that have finished a regime.
    """

    regimes: tuple[str, ...] = tuple(REGIMES)
    entrants: tuple[str, ...] = tuple(ENTRANTS)
    quick: bool = False
    runs: Path = RESULTS / "lm_race.jsonl"
    tune_only: bool = False
    tables_only: bool = False


def enter(
    config: RaceConfig, journal: Journal, corpus: data.Corpus, regime: str, name: str
) -> None:
    """Tunes one entrant and runs its best point at every budget and seed."""
    entrant, setup = ENTRANTS[name], QUICK if config.quick else REGIMES[regime]
    runs = Runs(
        journal,
        corpus,
        lambda: Runner(entrant.row, setup.setting),
        regime=regime,
        entrant=name,
    )
    found = search(
        entrant,
        setup.tries,
        lambda point: runs(point, setup.steps, TUNING_SEED, "tune")["loss"],
    )
    print(regime, name, found, flush=True)
    if config.tune_only:
        return
    for budget in setup.budgets:
        for seed in setup.seeds:
            runs(found["point"], budget, seed, "validation")


def average_flops(regime: str, name: str) -> float:
    """XLA's count for an average step of an entrant."""
    setting, entrant = REGIMES[regime].setting, ENTRANTS[name]
    anything = {hyperparameter: values[0] for hyperparameter, values in entrant.grid.items()}
    count = Runner(entrant.row, setting).flops(**anything)
    if not entrant.row.whole_batch:
        return count
    # This one branches on the device, and XLA counts a branch as if it were always taken.
    plain = average_flops(regime, "adamw")
    return plain + (count - plain) / setting.update_interval


def seconds_over_adamw(regime: str, names: list[str], rounds: int = 5) -> dict[str, float]:
    """Medians of an average step's seconds over AdamW's in the same round, refreshes included."""
    setting = REGIMES[regime].setting
    tokens = np.zeros((setting.batch_size, setting.model.context + 1), np.int32)
    steps: dict[str, Callable[[], float]] = {}
    for name in names:
        runner = Runner(ENTRANTS[name].row, setting)
        values = {hyper: grid[0] for hyper, grid in ENTRANTS[name].grid.items()}
        steps[name] = functools.partial(
            runner.seconds, [runner.init(0)], tokens, runner.traced(100, **values)
        )
    for step in steps.values():
        step()  # compiles
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        taken = {name: step() for name, step in steps.items()}
        for name in names:
            ratios[name].append(taken[name] / taken["adamw"])
    return {name: statistics.median(list_) for name, list_ in ratios.items()}


def finished(journal: Journal, regime: str, name: str) -> bool:
    """Whether an entrant has run at every budget and seed."""
    setup = REGIMES[regime]
    raced = {
        (row["key"]["steps"], row["key"]["seed"])
        for row in journal.rows
        if (row["key"]["regime"], row["key"]["entrant"]) == (regime, name)
        and row["key"]["split"] == "validation"
    }
    return raced >= set(itertools.product(setup.budgets, setup.seeds))


def race(config: RaceConfig) -> None:
    """Runs what is missing and writes the tables and the plot."""
    origin = provenance("benchmarks.lm_race")
    journal = Journal(None if config.quick else config.runs)
    if not config.tables_only:
        corpus = data.load("stdlib")
        for regime in config.regimes:
            for name in config.entrants:
                enter(config, journal, corpus, regime, name)
    if config.quick or config.tune_only:
        return
    # Whoever raced now, the tables have all that have finished beside AdamW.
    compared = [regime for regime in REGIMES if finished(journal, regime, "adamw")]
    pairs = itertools.product(compared, ENTRANTS)
    done = [pair for pair in pairs if finished(journal, *pair)]
    flops = {pair: average_flops(*pair) for pair in done}
    seconds = {
        (regime, name): ratio
        for regime in compared
        for name, ratio in seconds_over_adamw(regime, [n for r, n in done if r == regime]).items()
    }
    chosen = [row for row in journal.rows if (row["key"]["regime"], row["key"]["entrant"]) in done]
    summary = race_table.summarize(chosen, flops, seconds)
    settings = {name: dataclasses.asdict(REGIMES[name]) for name in summary}
    ladders = {name: entrant.grid for name, entrant in ENTRANTS.items()}
    result = {
        **origin,
        "regimes": settings,
        "grids": ladders,
        "ladders": LADDERS,
        "results": summary,
    }
    (RESULTS / "lm_race.json").write_text(json.dumps(result, indent=2) + "\n")
    race_table.plot(summary, RESULTS / "lm_race.png")


if __name__ == "__main__":
    race(tyro.cli(RaceConfig))
