"""Who races: the trainer's optimizers that have a grid, and variants that only the race has."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax

from examples.lm.config import Hyperparameters
from examples.lm.optimizers import (
    OPTIMIZERS,
    Curvature,
    Optimizer,
    gauss_newton,
    muon_dimensions,
)

Rest = Callable[[Any, optax.Schedule], optax.GradientTransformation]


@dataclass(frozen=True)
class RaceHyperparameters(Hyperparameters):
    """Those of the trainer, and one that only some entrants have.

    Attributes:
      matrix_learning_rate: the peak of Muon's schedule; `learning_rate` is that of the rest.
    """

    matrix_learning_rate: float | None = None


def muon_with(build_rest: Rest, dimensions: Callable[[Any], Any] = muon_dimensions) -> Rest:
    """Muon on the matrices that `dimensions` describes, another optimizer on the rest."""

    def label(params: Any) -> Any:
        matrix = optax.contrib.MuonDimensionNumbers
        return jax.tree.map(
            lambda d: "matrix" if isinstance(d, matrix) else "rest",
            dimensions(params),
            is_leaf=lambda d: d is None or isinstance(d, matrix),
        )

    def build(h: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
        matrices = optax.contrib.muon(
            lambda step: schedule(step) * (h.matrix_learning_rate / h.learning_rate),
            weight_decay=h.weight_decay,
            muon_weight_dimension_numbers=dimensions,
        )
        return optax.partition({"matrix": matrices, "rest": build_rest(h, schedule)}, label)

    return build


def variant(
    name: str,
    grid: Mapping[str, tuple[float, ...]],
    curvature: Curvature | None = None,
    *,
    muon: bool = False,
    **fixed: float,
) -> Optimizer:
    """A row made from one of the trainer's.

    Args:
      name: of the trainer's row.
      grid: where its tuning starts.
      curvature: another estimate than the row's.
      muon: whether Muon takes the blocks' matrices.
      **fixed: hyperparameters that are not tuned and not those below.
    """
    row = OPTIMIZERS[name]
    start = {"b2": 0.99, "weight_decay": 0.1, "gamma": 0.05, **fixed}
    start |= {name: values[0] for name, values in grid.items()}
    h = RaceHyperparameters(**start)
    build = muon_with(row.build) if muon else row.build
    curvature = curvature or row.curvature
    return dataclasses.replace(row, build=build, tiny=h, large=h, curvature=curvature, grid=grid)


def with_muon(name: str, gamma: tuple[float, ...], warmup: float, **options: Any) -> Optimizer:
    """A Sophia on what Muon leaves."""
    grid = {
        "matrix_learning_rate": (2e-2, 4e-2),
        "learning_rate": (4e-3, 8e-3),
        "gamma": gamma,
        "b1": (0.8,),
        "warmup": (warmup,),
    }
    return variant(name, grid, muon=True, **options)


PROPAGATION = Curvature(
    functools.partial(gauss_newton, sampling="curvature_propagation"), second_order=False
)

ENTRANTS: dict[str, Optimizer] = {
    **{name: row for name, row in OPTIMIZERS.items() if row.grid},
    "muon_adamw": variant(
        "adamw",
        {
            "matrix_learning_rate": (2e-2, 4e-2),
            "learning_rate": (1e-2, 2e-2),
            "b1": (0.8, 0.9),
            "warmup": (0.05,),
        },
        muon=True,
        b2=0.95,
    ),
    "muon_sophia_g": with_muon("sophia_g", (0.05, 0.2), 0.1),
    "muon_sophia_g_propagation": with_muon("sophia_g", (0.05, 0.2), 0.1, curvature=PROPAGATION),
    "muon_sophia_h": with_muon("sophia_h", (0.02, 0.1), 0.05),
    "muon_sophia_h_paper": with_muon("sophia_h_paper", (0.02, 0.1), 0.1),
    "sophia_h_target": variant(
        "sophia_h",
        {
            "learning_rate": (4e-3, 8e-3),
            "win_rate": (0.3, 0.5),
            "b1": (0.7, 0.8),
            "warmup": (0.05,),
        },
    ),
    "sophia_g_target": variant(
        "sophia_g",
        {
            "learning_rate": (3e-3, 6e-3),
            "win_rate": (0.5, 0.7),
            "b1": (0.7, 0.8),
            "warmup": (0.2,),
        },
    ),
    "sophia_g_propagation": variant(
        "sophia_g",
        {
            "learning_rate": (3e-3, 6e-3),
            "b2": (0.95,),
            "gamma": (0.1, 0.5),
            "b1": (0.7, 0.8),
            "warmup": (0.2,),
        },
        PROPAGATION,
    ),
}
