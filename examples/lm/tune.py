"""How the tiny model's hyperparameters were found: the same number of tries for every optimizer.

Each point trains a third of a comparison's steps, with its schedule shortened alike, and is judged
on the `tune` split, from seeds that no comparison uses. Results are appended to a file as they
come; points that are in it already are not run again. A best value at an edge of its grid adds a
grid of the same number of points for every optimizer.
"""

import dataclasses
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.lm import data
from examples.lm.config import TrainConfig
from examples.lm.loop import fit
from examples.lm.optimizers import hyperparameters

Grid = dict[str, tuple[float, ...]]

# Eight points each.
FIRST: dict[str, Grid] = {
    "adamw": {
        "learning_rate": (1e-2, 5e-3, 2e-2, 4e-2),
        "b1": (0.9, 0.8),
        "warmup": (0.1,),
    },
    "sophia_g": {
        "learning_rate": (2e-3, 4e-3),
        "gamma": (0.05, 0.2),
        "b1": (0.9, 0.8),
        "warmup": (0.2,),
    },
    "sophia_h": {
        "learning_rate": (2e-3, 4e-3),
        "gamma": (0.02, 0.1),
        "b1": (0.9, 0.8),
        "warmup": (0.2,),
    },
}

# Four more each, past the edges at which the best values lay.
SECOND: dict[str, Grid] = {
    "adamw": {
        "learning_rate": (1e-2, 1.4e-2),
        "b1": (0.7,),
        "warmup": (0.1, 0.2),
    },
    "sophia_g": {
        "learning_rate": (6e-3, 8e-3),
        "gamma": (0.05,),
        "b1": (0.8, 0.7),
        "warmup": (0.2,),
    },
    "sophia_h": {
        "learning_rate": (6e-3, 8e-3),
        "gamma": (0.02,),
        "b1": (0.8, 0.7),
        "warmup": (0.2,),
    },
}


@dataclass(frozen=True)
class TuneConfig:
    """Which optimizers to tune, and where the results are kept.

    Attributes:
      optimizers: names in `FIRST`.
      results: a file of one JSON object a line, continued if it exists.
      seed: of the params, the batches and the noise; comparisons use others.
      steps: of each try.
    """

    optimizers: tuple[str, ...] = tuple(FIRST)
    results: str = "benchmarks/results/lm_tuning.jsonl"
    seed: int = 1000
    steps: int = 500


def points(grid: Grid) -> list[dict[str, float]]:
    """All combinations of a grid's values."""
    return [dict(zip(grid, p, strict=True)) for p in itertools.product(*grid.values())]


def tune(config: TuneConfig) -> None:
    """Runs the points that the results file lacks, the optimizers in turn, and prints the best."""
    path = Path(config.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    corpus = data.load("stdlib")
    queues = [
        [(name, p) for grid in (FIRST, SECOND) for p in points(grid[name])]
        for name in config.optimizers
    ]
    for name, point in (row for rows in zip(*queues, strict=True) for row in rows):
        key = {"optimizer": name, "seed": config.seed, "steps": config.steps, **point}
        if any(key.items() <= row.items() for row in done):
            continue
        run = TrainConfig(
            optimizer=name,
            seed=config.seed,
            steps=config.steps,
            eval_interval=config.steps,
            **point,
        )
        result = fit(run, corpus, split="tune")
        row: dict[str, Any] = {
            **key,
            **dataclasses.asdict(hyperparameters(run)),
            "tune_loss": result.validation_loss,
            "win_rate": result.win_rate,
        }
        done.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    for name in config.optimizers:
        rows = [r for r in done if r["optimizer"] == name and r["seed"] == config.seed]
        print("best:", json.dumps(min(rows, key=lambda row: row["tune_loss"])))
