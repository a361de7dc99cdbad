"""Who races: each optimizer's row, and the same tuning procedure for every one of them.

Hyperparameters live on ladders. A search starts from a small grid and then climbs: it tries the
neighbours of the best point so far, one hyperparameter at a time, until its tries are spent. So an
optimum at the edge of the grid moves the grid, and every optimizer has the same number of tries.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import optax

import sophia_optax
from examples.lm.config import Hyperparameters
from examples.lm.optimizers import (
    OPTIMIZERS,
    Forward,
    Optimizer,
    gauss_newton,
    hutchinson,
    muon_dimensions,
    no_curvature,
)

LADDERS: dict[str, tuple[float, ...]] = {
    "learning_rate": tuple(
        float(f"{m}e{e}") for e in range(-5, 0) for m in (1, 1.5, 2, 3, 4, 6, 8)
    ),
    "b1": (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.965, 0.98),
    "b2": (0.9, 0.95, 0.98, 0.99, 0.995),
    "gamma": (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
    "win_rate": (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "warmup": (0.02, 0.05, 0.1, 0.2, 0.3, 0.4),
}
LADDERS["matrix_learning_rate"] = LADDERS["learning_rate"]

Point = dict[str, float]


@dataclass(frozen=True)
class RaceHyperparameters(Hyperparameters):
    """Those of the trainer, and one that only some entrants have.

    Attributes:
      matrix_learning_rate: the peak of Muon's schedule; `learning_rate` is that of the rest.
    """

    matrix_learning_rate: float | None = None


@dataclass(frozen=True)
class Entrant:
    """One optimizer in the race.

    Attributes:
      row: how it is built, what curvature it takes, what is not tuned.
      grid: the values to begin with, their combinations.
      order: the hyperparameters in the order in which neighbours are tried; those of the grid
        first, then those that begin at the row's value.
    """

    row: Optimizer
    grid: dict[str, tuple[float, ...]]
    order: tuple[str, ...]


Rest = Callable[[Any, optax.Schedule], optax.GradientTransformation]


def muon_beside(build_rest: Rest) -> Rest:
    """Muon on the blocks' matrices, another optimizer on embeddings, norms and biases."""

    def label(params: Any) -> Any:
        dimensions = muon_dimensions(params)
        matrix = optax.contrib.MuonDimensionNumbers
        return jax.tree.map(
            lambda d: "matrix" if isinstance(d, matrix) else "rest",
            dimensions,
            is_leaf=lambda d: d is None or isinstance(d, matrix),
        )

    def build(h: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
        matrices = optax.contrib.muon(
            lambda step: schedule(step) * (h.matrix_learning_rate / h.learning_rate),
            weight_decay=h.weight_decay,
            muon_weight_dimension_numbers=muon_dimensions,
        )
        return optax.partition({"matrix": matrices, "rest": build_rest(h, schedule)}, label)

    return build


sophia_g, sophia_h = OPTIMIZERS["sophia_g"].build, OPTIMIZERS["sophia_h"].build


def curvature_propagation(forward: Forward, params: Any, batch: jax.Array) -> dict[str, Any]:
    """Sophia-G's estimate from random signs in place of labels."""
    return {
        "hessian_fn": sophia_optax.gauss_newton_bartlett(
            lambda p: forward.logits(p, batch[:, :-1]), params, sampling="curvature_propagation"
        )
    }


def _row(build: Rest, extra_args: Any, **start: float) -> Optimizer:
    """A row of the trainer's kind, from hyperparameters that the grid may replace."""
    h = RaceHyperparameters(**{"b2": 0.99, "weight_decay": 0.1, "b1": 0.8, "gamma": 0.05, **start})
    return Optimizer(build, extra_args, tiny=h, large=h)


def _trainer_row(name: str) -> Optimizer:
    row = OPTIMIZERS[name]
    h = RaceHyperparameters(**vars(row.tiny))
    return replace(row, tiny=h)


ENTRANTS: dict[str, Entrant] = {
    "adamw": Entrant(
        _trainer_row("adamw"),
        {"learning_rate": (8e-3, 1.5e-2), "b1": (0.8, 0.9), "warmup": (0.05, 0.1)},
        ("learning_rate", "b1", "warmup", "b2"),
    ),
    "lion": Entrant(
        _trainer_row("lion"),
        {"learning_rate": (1e-3, 2e-3), "b1": (0.8, 0.9), "warmup": (0.05, 0.1)},
        ("learning_rate", "b1", "warmup", "b2"),
    ),
    "muon_adamw": Entrant(
        _row(muon_beside(OPTIMIZERS["adamw"].build), no_curvature, b2=0.95, warmup=0.05),
        {"matrix_learning_rate": (2e-2, 4e-2), "learning_rate": (1e-2, 2e-2), "b1": (0.8, 0.9)},
        ("matrix_learning_rate", "learning_rate", "b1", "warmup"),
    ),
    "muon_sophia_g": Entrant(
        _row(muon_beside(sophia_g), gauss_newton, warmup=0.1),
        {"matrix_learning_rate": (2e-2, 4e-2), "learning_rate": (4e-3, 8e-3), "gamma": (0.05, 0.2)},
        ("matrix_learning_rate", "learning_rate", "gamma", "b1", "warmup"),
    ),
    "muon_sophia_h": Entrant(
        _row(muon_beside(sophia_h), hutchinson, warmup=0.1),
        {"matrix_learning_rate": (2e-2, 4e-2), "learning_rate": (4e-3, 8e-3), "gamma": (0.02, 0.1)},
        ("matrix_learning_rate", "learning_rate", "gamma", "b1", "warmup"),
    ),
    "contrib_sophia": Entrant(
        _trainer_row("contrib_sophia"),
        {"learning_rate": (1e-3, 2e-3), "gamma": (0.02, 0.1), "b1": (0.8, 0.9)},
        ("learning_rate", "gamma", "b1", "warmup"),
    ),
    "sophia_h": Entrant(
        _row(sophia_h, hutchinson, warmup=0.2),
        {"learning_rate": (4e-3, 8e-3), "gamma": (0.02, 0.05), "b1": (0.7, 0.8)},
        ("learning_rate", "gamma", "b1", "warmup"),
    ),
    "sophia_g": Entrant(
        _row(sophia_g, gauss_newton, warmup=0.2),
        {"learning_rate": (3e-3, 6e-3), "gamma": (0.1, 0.5), "b1": (0.7, 0.8)},
        ("learning_rate", "gamma", "b1", "warmup"),
    ),
    # Variants of those above.
    "sophia_h_absolute": Entrant(
        _row(sophia_h, hutchinson, warmup=0.05, absolute_curvature=True),
        {"learning_rate": (4e-3, 8e-3), "gamma": (0.02, 0.05), "b1": (0.7, 0.8)},
        ("learning_rate", "gamma", "b1", "warmup"),
    ),
    "sophia_h_absolute_target": Entrant(
        _row(sophia_h, hutchinson, warmup=0.05, absolute_curvature=True, win_rate=0.5),
        {"learning_rate": (4e-3, 8e-3), "win_rate": (0.3, 0.5), "b1": (0.7, 0.8)},
        ("learning_rate", "win_rate", "b1", "warmup"),
    ),
    "sophia_g_target": Entrant(
        _row(sophia_g, gauss_newton, warmup=0.2, win_rate=0.5),
        {"learning_rate": (3e-3, 6e-3), "win_rate": (0.5, 0.7), "b1": (0.7, 0.8)},
        ("learning_rate", "win_rate", "b1", "warmup"),
    ),
    "sophia_g_propagation": Entrant(
        _row(sophia_g, curvature_propagation, warmup=0.2, b2=0.95),
        {"learning_rate": (3e-3, 6e-3), "gamma": (0.1, 0.5), "b1": (0.7, 0.8)},
        ("learning_rate", "b2", "gamma", "b1", "warmup"),
    ),
    "muon_sophia_h_absolute": Entrant(
        _row(muon_beside(sophia_h), hutchinson, warmup=0.05, absolute_curvature=True),
        {"matrix_learning_rate": (2e-2, 4e-2), "learning_rate": (4e-3, 8e-3), "gamma": (0.02, 0.1)},
        ("matrix_learning_rate", "learning_rate", "gamma", "b1", "warmup"),
    ),
    "muon_sophia_g_propagation": Entrant(
        _row(muon_beside(sophia_g), curvature_propagation, warmup=0.1),
        {"matrix_learning_rate": (2e-2, 4e-2), "learning_rate": (4e-3, 8e-3), "gamma": (0.05, 0.2)},
        ("matrix_learning_rate", "learning_rate", "gamma", "b1", "warmup"),
    ),
}


def neighbours(point: Point, order: tuple[str, ...]) -> Iterator[Point]:
    """One rung up or down, one hyperparameter at a time."""
    for name in order:
        ladder = LADDERS[name]
        rung = ladder.index(point[name])
        for other in (rung + 1, rung - 1):
            if 0 <= other < len(ladder):
                yield {**point, name: ladder[other]}


def search(entrant: Entrant, tries: int, loss_of: Callable[[Point], float]) -> dict[str, Any]:
    """Tunes one entrant.

    Args:
      entrant: its grid and ladders.
      tries: how many points may be tried.
      loss_of: runs a point; NaN where it diverged.

    Returns:
      The best point, its loss, and whether a neighbour of it was left untried ("open": the names
      of the hyperparameters of those).
    """
    fixed = {name: getattr(entrant.row.tiny, name) for name in entrant.order}
    grid = [
        dict(zip(entrant.grid, v, strict=True)) for v in itertools.product(*entrant.grid.values())
    ]
    tried: list[tuple[Point, float]] = []

    def attempt(point: Point) -> None:
        loss = loss_of(point)
        tried.append((point, loss if loss == loss else float("inf")))

    for point in grid:
        attempt({**fixed, **point})
    while True:
        best, loss = min(tried, key=lambda t: t[1])
        points = [p for p, _ in tried]
        untried = [p for p in neighbours(best, entrant.order) if p not in points]
        if not untried or len(tried) >= tries:
            left = sorted({n for p in untried for n in p if p[n] != best[n]})
            return {"point": best, "loss": loss, "tries": len(tried), "open": left}
        attempt(untried[0])
