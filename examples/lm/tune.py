"""Tuning: the same number of tries for every optimizer, from a grid to the neighbours of the best.

Hyperparameters lie on ladders. A search starts with a small grid and then climbs: it tries the
neighbours of the best point so far, one hyperparameter at a time, until its tries are spent. So an
optimum at the edge of the grid moves the search beyond it, and every optimizer has equal tries.

The command `tune` found the tiny model's hyperparameters. Each point trains a third of a
comparison's steps, with its schedule shortened alike, and is judged on the `tune` split, from seeds
that no comparison uses. Results are appended to a file as they come, and none is computed twice.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import data, run_folder
from .config import TrainConfig, UsageError
from .loop import Result, fit
from .run import Run, resolve
from .train import Trainer

Point = dict[str, float]
Grid = Mapping[str, tuple[float, ...]]

# Each hyperparameter's values, ascending.
LADDERS: dict[str, tuple[float, ...]] = {
    "learning_rate": tuple(
        float(f"{m}e{e}") for e in range(-5, 0) for m in (1, 1.5, 2, 3, 4, 6, 8)
    ),
    "b1": (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.965, 0.98),
    "b2": (0.9, 0.95, 0.98, 0.99, 0.995),
    "gamma": (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
    "win_rate": (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "warmup": (0.02, 0.05, 0.1, 0.2, 0.3, 0.4),
    "basis_interval": (1, 2, 5, 10, 20),
}
LADDERS["matrix_learning_rate"] = LADDERS["learning_rate"]


def points(grid: Grid) -> list[Point]:
    """All combinations of a grid's values."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def neighbours(point: Point) -> Iterator[Point]:
    """One value up or down its ladder, one hyperparameter at a time, in the point's order."""
    for name, value in point.items():
        ladder = LADDERS[name]
        index = ladder.index(value)
        for other in (index + 1, index - 1):
            if 0 <= other < len(ladder):
                yield {**point, name: ladder[other]}


def search(grid: Grid, tries: int, loss_of: Callable[[Point], float]) -> dict[str, Any]:
    """Tunes one optimizer.

    Args:
      grid: the values to begin with, all on the ladders.
      tries: how many points may be tried; the grid is always tried whole.
      loss_of: trains at a point; NaN where it diverged.

    Returns:
      The best point, its loss, how many tries were made, and the names of the hyperparameters in
      which neighbours of the best point were left untried ("open").
    """
    tried: list[tuple[Point, float]] = []

    def attempt(point: Point) -> None:
        loss = loss_of(point)
        tried.append((point, math.inf if math.isnan(loss) else loss))

    for point in points(grid):
        attempt(point)
    while True:
        best, loss = min(tried, key=lambda t: t[1])
        known = [point for point, _ in tried]
        untried = [point for point in neighbours(best) if point not in known]
        if not untried or len(tried) >= tries:
            left = sorted(
                {name for point in untried for name in point if point[name] != best[name]}
            )
            return {"point": best, "loss": loss, "tries": len(tried), "open": left}
        attempt(untried[0])


class Sweep:
    """Runs of one optimizer at many points, which share one compilation.

    Args:
      run: what they have in common, with its vocabulary.
      corpus: their text.
      make: compiles the trainer, when the first run needs it.
    """

    def __init__(
        self,
        run: Run,
        corpus: data.Corpus,
        make: Callable[[Run], Trainer] = lambda run: Trainer(run, traced=True),
    ):
        self.run, self.corpus, self.make = run, corpus, make
        self.trainer: Trainer | None = None

    def __call__(self, point: Point, steps: int, seed: int, split: str) -> Result:
        """Trains once.

        Args:
          point: the hyperparameters that differ from those of `run`.
          steps: how long; the schedule's length too.
          seed: of the params and of the order of the data.
          split: what the loss is reported on.
        """
        self.trainer = self.trainer or self.make(self.run)
        run = dataclasses.replace(
            self.run,
            config=dataclasses.replace(
                self.run.config, steps=steps, seed=seed, eval_interval=steps
            ),
            hyperparameters=dataclasses.replace(self.run.hyperparameters, **point),
        )
        return fit(run, self.corpus, split=split, trainer=self.trainer.at(run))


@dataclass(frozen=True)
class TuneConfig:
    """Which optimizers to tune, and where the results are kept.

    Attributes:
      optimizers: names in `optimizers.OPTIMIZERS` that have a grid.
      results: a file of one JSON object a line, continued if it exists.
      seed: of the params and the batches; comparisons use others.
      steps: of each try.
      tries: for each optimizer.
    """

    optimizers: tuple[str, ...] = ("adamw", "sophia_g", "sophia_h")
    results: str = "benchmarks/results/lm_tuning.jsonl"
    seed: int = 1000
    steps: int = 500
    tries: int = 16


def tune(config: TuneConfig) -> None:
    """Runs the points that the results file lacks and prints each optimizer's best."""
    path = Path(config.results)
    runs = {name: resolve(TrainConfig(optimizer=name)) for name in config.optimizers}
    for name, run in runs.items():
        if not run.optimizer.grid:
            raise UsageError(f"{name} has no grid to begin with. Give its row one.")
    with run_folder.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    done = run_folder.read_lines(path)
    corpus = data.load("stdlib")
    for name, run in runs.items():
        sweep = Sweep(run.with_vocabulary(corpus.vocab_size), corpus)

        def loss_of(point: Point, name: str = name, sweep: Sweep = sweep) -> float:
            key = {"optimizer": name, "seed": config.seed, "steps": config.steps, **point}
            found = next((row for row in done if key.items() <= row.items()), None)
            if found is None:
                result = sweep(point, config.steps, config.seed, "tune")
                found = {
                    **dataclasses.asdict(sweep.run.hyperparameters),
                    **key,
                    "tune_loss": result.validation_loss,
                    "win_rate": result.win_rate,
                }
                done.append(found)
                with run_folder.writing(path):
                    run_folder.append_whole(path, (json.dumps(found) + "\n").encode())
                print(json.dumps(found), flush=True)
            return found["tune_loss"]

        print(
            "best:",
            json.dumps({"optimizer": name, **search(run.optimizer.grid, config.tries, loss_of)}),
        )
