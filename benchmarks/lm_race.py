"""How many steps each optimizer needs to reach the loss of a tuned AdamW.

    python -m benchmarks.lm_race [--quick] [--regimes small large] [--tables-only]

Every entrant (`entrants.py`) is tuned with the same number of tries (`examples/lm/tune.py`), on the
`tune` split and a seed of its own. Then its best point is run at several budgets, each with its own
full decay of the learning rate, on other seeds, and judged on the `validation` split. Runs are
appended to `results/lm_race.jsonl` as they end, and what is there is not run again, so that the
race can be stopped and continued; `results/lm_race.json` holds the tables and `lm_race.png` the
plot. The seconds of a step are measured for the tables, AdamW and the entrants that have none yet
in turn, so let nothing else run then.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks import race_table
from benchmarks.entrants import ENTRANTS
from benchmarks.lib import timing
from benchmarks.lib.journal import Journal
from benchmarks.lib.provenance import RESULTS, provenance
from benchmarks.lib.sweep import TUNING_SEED, Runs, Workload, compiled
from examples.lm import data, plan
from examples.lm.config import ModelConfig
from examples.lm.model import parameter_count
from examples.lm.tune import LADDERS, Point, search


@dataclass(frozen=True)
class Regime:
    """A workload, its tuning budget and the budgets that are raced.

    Attributes:
      workload: model and batches.
      steps: of a tuning run.
      budgets: steps of the raced runs, each with a full decay.
      tries: points that each entrant may try.
      seeds: of the raced runs; tuning uses another.
    """

    workload: Workload
    steps: int
    budgets: tuple[int, ...]
    tries: int = 16
    seeds: tuple[int, ...] = (0, 1, 2)

    def search(self, name: str, loss_of: Callable[[Point], float]) -> dict[str, Any]:
        """Tunes an entrant; returns what `tune.search` does."""
        return search(ENTRANTS[name].grid, self.tries, loss_of)


REGIMES = {
    "small": Regime(Workload(batch_size=8, curvature_batch=4), 500, (250, 500, 1000)),
    "large": Regime(Workload(batch_size=64, curvature_batch=8), 125, (63, 125, 250), tries=12),
    "medium": Regime(
        Workload(
            ModelConfig(layers=4, width=160, heads=5, context=128, init_scale=0.06),
            batch_size=64,
            curvature_batch=8,
        ),
        125,
        (63, 125, 250),
    ),
}
QUICK = Regime(
    Workload(
        ModelConfig(layers=1, width=32, heads=2, context=32, init_scale=0.1),
        batch_size=2,
        curvature_batch=1,
    ),
    10,
    (5, 10),
    tries=2,
    seeds=(0,),
)
ROUNDS = 5  # of the timings


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
    row, setup = ENTRANTS[name], QUICK if config.quick else REGIMES[regime]
    runs = Runs(journal, corpus, setup.workload.run(row), regime=regime, entrant=name)
    found = setup.search(name, lambda point: runs(point, setup.steps, TUNING_SEED, "tune")["loss"])
    print(regime, name, found, flush=True)
    if config.tune_only:
        return
    for budget in setup.budgets:
        for seed in setup.seeds:
            runs(found["point"], budget, seed, "validation")


@functools.cache
def raced(regime: str, entrant: str) -> dict[str, Any]:
    """What the race found for an entrant: its point, and its losses by steps and seed."""
    return json.loads((RESULTS / "lm_race.json").read_text())["results"][regime][entrant]


def average_flops(regime: str, name: str) -> float:
    """XLA's count for an average step of an entrant."""
    return plan.step_flops(REGIMES[regime].workload.run(ENTRANTS[name]))["flops_average"]


def seconds_over_adamw(regime: str, names: list[str]) -> dict[str, float]:
    """Medians of an average step's seconds over AdamW's in the same round, refreshes included."""
    workload, corpus = REGIMES[regime].workload, data.load("stdlib")
    trainers = {name: compiled(workload.run(ENTRANTS[name])) for name in names}
    measures = {name: timing.mean_step(trainer, corpus) for name, trainer in trainers.items()}
    rows = timing.over_adamw(measures, ROUNDS)
    return {name: row["over_adamw"] for name, row in rows.items()}


def costs(
    done: list[tuple[str, str]], path: Path
) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], float]]:
    """FLOPs and seconds of an average step over AdamW's, by regime and entrant.

    Args:
      done: the pairs of regime and entrant.
      path: the tables so far; what they have is not measured again.
    """
    known = json.loads(path.read_text())["results"] if path.exists() else {}
    flops, seconds = {}, {}
    for regime in dict.fromkeys(regime for regime, _ in done):
        rows = known.get(regime, {})
        missing = [n for r, n in done if r == regime and n != "adamw" and n not in rows]
        if missing:
            adamw = average_flops(regime, "adamw")
            measured = seconds_over_adamw(regime, ["adamw", *missing])
        for name in (name for r, name in done if r == regime):
            if name in missing:
                flops[regime, name] = average_flops(regime, name) / adamw
                seconds[regime, name] = measured[name]
            else:
                row = rows.get(name, {"flops_over_adamw": 1.0, "seconds_over_adamw": 1.0})
                flops[regime, name] = row["flops_over_adamw"]
                seconds[regime, name] = row["seconds_over_adamw"]
    return flops, seconds


def finished(journal: Journal, regime: str, name: str) -> list[dict[str, Any]]:
    """An entrant's rows in a journal: its tries, and its best point at every budget and seed.

    Args:
      journal: that of the race. It may hold more, such as a race at the best of fewer tries.
      regime: a name in `REGIMES`.
      name: a name in `ENTRANTS`.

    Returns:
      The rows; none where one of them is missing.
    """
    setup, names = REGIMES[regime], {"regime": regime, "entrant": name}
    rows = []

    def read(point: Point, steps: int, seed: int, split: str) -> dict[str, Any]:
        key = {**names, "steps": steps, "seed": seed, "split": split, **point}
        rows.append(next(row for row in journal.rows if row["key"] == key))
        return rows[-1]

    try:
        found = setup.search(
            name, lambda point: read(point, setup.steps, TUNING_SEED, "tune")["loss"]
        )
        for budget, seed in itertools.product(setup.budgets, setup.seeds):
            read(found["point"], budget, seed, "validation")
    except StopIteration:
        return []
    return rows


def race(config: RaceConfig) -> None:
    """Runs what is missing and writes the tables and the plot."""
    origin = provenance("benchmarks.lm_race")
    journal = Journal(None if config.quick else config.runs)
    if not config.tables_only:
        corpus = data.load("stdlib")
        for regime in config.regimes[: 1 if config.quick else None]:
            for name in config.entrants:
                enter(config, journal, corpus, regime, name)
    if config.quick or config.tune_only:
        return
    # The tables have all entrants that have finished, not only those of this command.
    compared = [regime for regime in REGIMES if finished(journal, regime, "adamw")]
    done = {
        pair: rows
        for pair in itertools.product(compared, ENTRANTS)
        if (rows := finished(journal, *pair))
    }
    flops, seconds = costs(list(done), RESULTS / "lm_race.json")
    summary = race_table.summarize(list(itertools.chain(*done.values())), flops, seconds)
    settings = {
        name: {
            **dataclasses.asdict(REGIMES[name]),
            "parameters": parameter_count(REGIMES[name].workload.run("adamw").model),
        }
        for name in summary
    }
    result = {
        **origin,
        "regimes": settings,
        "grids": {name: row.grid for name, row in ENTRANTS.items()},
        "ladders": LADDERS,
        "results": summary,
    }
    (RESULTS / "lm_race.json").write_text(json.dumps(result, indent=2) + "\n")
    race_table.plot(summary, RESULTS / "lm_race.png")


if __name__ == "__main__":
    race(tyro.cli(RaceConfig))
