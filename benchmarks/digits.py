"""Tuned optimizers on the digits and on their captions: the tasks of `examples.vision`.

    python -m benchmarks.digits [--quick] [--tasks classes pixels captions]

Every optimizer is tuned with the same number of tries (`examples/lm/tune.py`), on images and seeds
that are not reported. Then it trains on other seeds and is judged on the test images. All the runs
of an optimizer on a task share one compilation: a whole run is one jitted function of its
hyperparameters and its seed. Runs are appended to `results/digits.jsonl` as they end, and what is
there is not run again, so that the comparison can be stopped and continued. `results/vision.json`
and `.png` have the digits and their pixels, `results/contrastive.json` and `.png` the captions.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import sklearn
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.entrants import muon_with, variant
from benchmarks.lib.journal import Journal
from benchmarks.lib.provenance import RESULTS, provenance
from examples import contrastive, vision
from examples.lm.optimizers import OPTIMIZERS, Curvature, Optimizer, build
from examples.lm.tune import Grid, Point, search

TASKS = {**vision.TASKS, "captions": contrastive.captions}
FILES = {"vision": ("classes", "pixels"), "contrastive": ("captions",)}
TUNING_SEEDS = (1000, 1001)
Run = Callable[[Point, Any], dict[str, Any]]


def blocks_matrices(params: Any) -> Any:
    """Inputs and outputs of the blocks' matrices, which are Muon's; None for all else."""

    def dimensions(path: Any, p: jax.Array) -> Any:
        hidden = p.ndim == 2 and "blocks" in jax.tree_util.keystr(path)
        return optax.contrib.MuonDimensionNumbers((0,), (1,)) if hidden else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def entrant(name: str, grid: Grid, estimator: vision.Estimator | None = None) -> Optimizer:
    """A row of the trainer's with another grid; short runs want a short average of h."""
    row = variant(name, grid, warmup=0.1, b2=0.9 if estimator else 0.99, basis_interval=1)
    return replace(row, curvature=Curvature(estimator) if estimator else None)


SOPHIA_G = functools.partial(entrant, "sophia_g", estimator=vision.gauss_newton)
ADAMW = {"learning_rate": (4e-3, 1e-2, 2e-2), "b1": (0.7, 0.9), "b2": (0.99,)}
RATES = {"learning_rate": (2e-3, 4e-3, 8e-3)}
ENTRANTS: dict[str, Optimizer] = {
    "adamw": entrant("adamw", ADAMW),
    "muon_adamw": replace(
        entrant("adamw", {"matrix_learning_rate": (1e-2, 3e-2, 1e-1), **ADAMW}),
        build=muon_with(OPTIMIZERS["adamw"].build, blocks_matrices),
    ),
    "sophia_g": SOPHIA_G({**RATES, "gamma": (0.02, 0.1), "b1": (0.7,)}),
    "sophia_g_target": SOPHIA_G({**RATES, "win_rate": (0.3, 0.7), "b1": (0.9,)}),
    "sophia_h": entrant(
        "sophia_h", {**RATES, "gamma": (0.01, 0.05), "b1": (0.7,)}, vision.hutchinson
    ),
    "sophia_g_eigenbasis": entrant(
        "sophia_g_eigenbasis",
        {**RATES, "gamma": (0.02, 0.1), "b1": (0.7,)},
        vision.gauss_newton,
    ),
    "soap": entrant("soap", ADAMW),
}


@dataclass(frozen=True)
class DigitsConfig:
    """What to compare.

    Attributes:
      tasks: names in `TASKS`.
      optimizers: names in `ENTRANTS`.
      steps: of every run, a multiple of ten.
      tries: how many points are tried for every optimizer on a task, to begin with.
      seeds: of the runs that are reported; tuning uses others.
      quick: a few steps of two optimizers, to see that it runs; writes to runs/.
      out: the folder for the results.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    optimizers: tuple[str, ...] = tuple(ENTRANTS)
    steps: int = 200
    tries: int = 20
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    quick: bool = False
    out: Path = RESULTS


QUICK = {
    "optimizers": ("adamw", "sophia_g"), "steps": 20, "tries": 1, "seeds": (0,),
    "out": Path("runs"),
}  # fmt: skip


def compiled(task: vision.Task, row: Optimizer, splits: dict[str, vision.Batch], steps: int) -> Run:
    """A whole run as one jitted function of a point and a seed, its series by refresh."""
    estimator = row.curvature.estimator if row.curvature else None

    @jax.jit
    def run(point: Point, seed: Any) -> dict[str, Any]:
        tx, _ = build(row, replace(row.tiny, **point), steps)
        found = vision.train(task, tx, estimator, splits, steps, seed)
        for name in ("training", "win_rate"):
            if name in found:
                found[name] = found[name].reshape(-1, row.tiny.update_interval).mean(axis=1)
        return found

    return run


@dataclass(frozen=True)
class Runs:
    """The runs of one optimizer on one task, each made once and then read from the journal."""

    journal: Journal
    run: Run
    names: dict[str, Any]

    def tuning_loss(self, point: Point) -> float:
        """The mean of the loss over the tuning seeds."""
        return float(np.mean([self.at(point, seed, "tune")["loss"] for seed in TUNING_SEEDS]))

    def reported(self, point: Point, seed: int) -> dict[str, Any]:
        """All that a reported run says."""
        return {"seed": seed, **self.at(point, seed, "test")["outcome"]}

    def at(self, point: Point, seed: int, split: str) -> dict[str, Any]:
        """The journal's row: the loss on a split, and the whole outcome for the test images."""

        def made() -> dict[str, Any]:
            outcome = readable(self.run(point, seed))
            whole = {"outcome": outcome} if split == "test" else {}
            return {"loss": outcome[split]["loss"], **whole}

        return self.journal.get({**self.names, "split": split, "seed": seed, **point}, made)


def race(
    name: str, splits: dict[str, vision.Batch], config: DigitsConfig, journal: Journal
) -> dict[str, dict[str, Any]]:
    """Tunes every optimizer on a task and runs it on the reported seeds.

    While one of them has a neighbour of its best point left to try, all get four more tries, up to
    twice as many as at first.

    Args:
      name: of the task.
      splits: "train", "tune", on which hyperparameters are chosen, and "test".
      config: steps, tries, seeds, optimizers.
      journal: of the runs.

    Returns:
      By optimizer: the tuning and the runs.
    """
    task = TASKS[name]()
    runs = {
        n: Runs(
            journal,
            compiled(task, ENTRANTS[n], splits, config.steps),
            {"task": name, "optimizer": n, "steps": config.steps},
        )
        for n in config.optimizers
    }
    tunings: dict[str, dict[str, Any]] = {}
    for tries in range(config.tries, 2 * config.tries + 1, 4):
        tunings = {n: search(ENTRANTS[n].grid, tries, own.tuning_loss) for n, own in runs.items()}
        if not any(tuning["open"] for tuning in tunings.values()):
            break
    return {
        n: {
            "tuning": tunings[n],
            "runs": [own.reported(tunings[n]["point"], seed) for seed in config.seeds],
        }
        for n, own in runs.items()
    }


def readable(tree: Any) -> Any:
    """Arrays as what JSON holds, to five digits."""
    digits = np.vectorize(lambda x: float(f"{x:.5g}"), otypes=[float])
    return jax.tree.map(lambda leaf: digits(leaf).tolist(), tree)


def spread(row: dict[str, Any], score: str) -> tuple[float, float]:
    """Mean and standard deviation of a test score over the seeds."""
    values = [run["test"][score] for run in row["runs"]]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def table(results: dict[str, dict[str, Any]]) -> Table:
    """Test scores of every optimizer, and the hyperparameters that the tuning chose."""
    shown = Table("task", "optimizer", "test loss", "score", "win rate", "tuned to")
    for task, rows in results.items():
        for name, row in rows.items():
            scores = [key for key in row["runs"][0]["test"] if key != "loss"]
            rates = [run["win_rate"] for run in row["runs"] if "win_rate" in run]
            shown.add_row(
                task,
                name,
                "{:.4f} ± {:.4f}".format(*spread(row, "loss")),
                ", ".join("{} {:.4f} ± {:.4f}".format(s, *spread(row, s)) for s in scores),
                f"{np.mean(rates):.2f}" if rates else "",
                ", ".join(f"{key} {value:.3g}" for key, value in row["tuning"]["point"].items()),
            )
    return shown


def plot(results: dict[str, dict[str, Any]]) -> Figure:
    """For every task the training loss, mean and range over seeds, and the test loss of each."""
    figure = Figure(figsize=(5 * len(results), 7), layout="constrained")
    axes = figure.subplots(2, len(results), squeeze=False)
    for column, (task, rows) in enumerate(results.items()):
        curves, dots = axes[:, column]
        for index, (name, row) in enumerate(rows.items()):
            losses = np.array([run["training"] for run in row["runs"]])
            steps = (np.arange(losses.shape[1]) + 1) * ENTRANTS[name].tiny.update_interval
            curves.plot(steps, losses.mean(axis=0), color=f"C{index}", label=name)
            curves.fill_between(
                steps, losses.min(axis=0), losses.max(axis=0), color=f"C{index}", alpha=0.2, lw=0
            )
            tested = [run["test"]["loss"] for run in row["runs"]]
            dots.plot(tested, [index] * len(tested), "o", color=f"C{index}", alpha=0.6)
            dots.plot(np.mean(tested), index, "k|", markersize=16)
        curves.set(title=task, xlabel="step", ylabel="training loss", yscale="log")
        curves.legend(fontsize=8)
        dots.set(xlabel="test loss (a dot a seed, a bar their mean)", yticks=range(len(rows)))
        dots.set_yticklabels(list(rows))
        dots.invert_yaxis()
    return figure


def main(config: DigitsConfig) -> None:
    """Races, prints the table, and writes the results and the plots."""
    if config.quick:
        config = replace(config, **QUICK)
    settings = {
        k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()
    }
    origin = {**provenance("benchmarks.digits"), "settings": settings}
    origin["versions"]["scikit-learn"] = sklearn.__version__
    splits = vision.digits()
    journal = Journal(None if config.quick else config.out / "digits.jsonl")
    config.out.mkdir(parents=True, exist_ok=True)
    for stem, tasks in FILES.items():
        results = {n: race(n, splits, config, journal) for n in tasks if n in config.tasks}
        if results:
            Console(width=160).print(table(results))
            whole = {**origin, "results": results}
            (config.out / f"{stem}.json").write_text(json.dumps(whole, indent=1) + "\n")
            plot(results).savefig(config.out / f"{stem}.png", dpi=120)


if __name__ == "__main__":
    main(tyro.cli(DigitsConfig))
