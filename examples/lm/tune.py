"""Tuning: the same number of tries for every optimizer, from a grid to the neighbours of the best.

Hyperparameters lie on ladders. A search starts with a small grid and then climbs: it tries the
neighbours of the best point so far, one hyperparameter at a time, until its tries are spent. So an
optimum at the edge of the grid moves the search beyond it, and every optimizer has equal tries.

The command `tune` found the tiny model's hyperparameters. Each point trains a third of a
comparison's steps, with its schedule shortened alike, and is judged on the `tune` split, from seeds
that no comparison uses. Results are appended to tuning.jsonl as they come, so that `--resume`
computes none twice.
"""

import dataclasses
import itertools
import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from . import data, hosts, memory, record, run_folder
from .config import RunConfig, TuneConfig, UsageError, for_optimizer, lookup
from .loop import Result, fit
from .optimizers import OPTIMIZERS, rate_for_width
from .run import Run
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
      stop: as `fit` takes it.
    """

    def __init__(
        self,
        run: Run,
        corpus: data.Corpus,
        make: Callable[[Run], Trainer] = lambda run: Trainer(run, traced=True),
        stop: Callable[[int], bool] | None = None,
    ):
        self.run, self.corpus, self.make, self.stop = run, corpus, make, stop
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
        trainer = self.trainer.at(run)
        with memory.enough(trainer):
            return fit(run, self.corpus, split=split, trainer=trainer, stop=self.stop)


def tune(config: TuneConfig) -> None:
    """Tries what the folder lacks, and prints and keeps each optimizer's best point."""
    configs = {name: for_optimizer(config, name) for name in config.optimizers}
    for name in configs:
        if not lookup(OPTIMIZERS, name, "optimizer").grid:
            raise UsageError(f"{name} has no grid to begin with. Give its row one.")
    with (
        record.started(config, configs, "tune") as (folder, runs, corpus, again),
        hosts.termination() as stop,
    ):
        print(f"{config.data}: {len(corpus.train):,} training tokens; results in {folder}")
        path = folder / run_folder.TUNING
        done = run_folder.read_lines(path)
        best = {}
        for name, run in runs.items():
            sweep = Sweep(run, corpus, stop=stop)
            smallest = len(points(grid_of(run)))
            if config.tries < smallest:
                print(
                    f"{name} makes {smallest} tries: --tries {config.tries} is less than its grid."
                )

            def loss_of(point: Point, name: str = name, sweep: Sweep = sweep) -> float:
                key = {"optimizer": name, **point}
                found = next((row for row in done if key.items() <= row.items()), None)
                if found is None:
                    result = sweep(point, config.steps, config.seed, "tune")
                    if result.steps < config.steps and result.diverged is None:
                        raise Stopped
                    found = run_folder.strict({
                        **dataclasses.asdict(sweep.run.hyperparameters),
                        **key,
                        "tune_loss": result.validation_loss,
                        "win_rate": result.win_rate,
                    })  # fmt: skip
                    done.append(found)
                    with run_folder.writing(path):
                        run_folder.append_whole(path, (json.dumps(found) + "\n").encode())
                    print(json.dumps(found), flush=True)
                return math.nan if found["tune_loss"] is None else found["tune_loss"]

            try:
                best[name] = search(grid_of(run), config.tries, loss_of)
            except Stopped:
                print(f"Stopped. Continue: {again}")
                return
            print("best:", json.dumps({"optimizer": name, **best[name]}))
        summary = {"config": dataclasses.asdict(config), "best": best}
        run_folder.write_json(folder / run_folder.SUMMARY, summary)
        for name, found in best.items():
            print(f"Train with it: {training_command(config, name, found['point'])}")


class Stopped(Exception):
    """A signal ended a try."""


def grid_of(run: Run) -> Grid:
    """The optimizer's grid, with its learning rates lowered for the width, on the ladder."""
    rates = LADDERS["learning_rate"]

    def lowered(rate: float) -> float:
        wanted = rate * rate_for_width(run.model)
        return min(rates, key=lambda rung: abs(math.log(rung / wanted)))

    grid = dict(run.optimizer.grid)
    return grid | {"learning_rate": tuple(map(lowered, grid["learning_rate"]))}


def training_command(config: TuneConfig, optimizer: str, point: Point) -> str:
    """The command that trains at a point, with the settings of the search that were not default."""
    given = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(RunConfig)
        if field.name not in ("mesh", "out", "resume", "seed", "steps")
        and getattr(config, field.name) != field.default
    }
    if not OPTIMIZERS[optimizer].uses("curvature_batch"):
        given.pop("curvature_batch", None)
    flags = {"optimizer": optimizer, **given, **point}
    words = ["python", "-m", __package__, "train"]
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)
