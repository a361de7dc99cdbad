"""The optimizers by name: how each is built, its curvature, its defaults, where tuning starts."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

import sophia_optax

from .config import (
    MODELS,
    Hyperparameters,
    ModelConfig,
    TrainConfig,
    UsageError,
    flag,
    lookup,
    model_of,
)

Params = Any
Batch = jax.Array

# --- the curvature --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forward:
    """The model as functions of its params: what an estimator differentiates.

    Attributes:
      logits: (params, tokens [B, L]) -> [B, L, V]. Its attention may be a fused kernel, which has
        first derivatives only.
      loss: (params, windows [B, L + 1]) -> scalar, twice differentiable: with XLA's attention.
    """

    logits: Callable[[Params, jax.Array], jax.Array]
    loss: Callable[[Params, Batch], jax.Array]


@dataclass(frozen=True)
class Curvature:
    """How the curvature of an optimizer is estimated.

    Attributes:
      estimator: (forward, params, windows [B, L + 1]) -> what the optimizer's `update` takes as
        `hessian_fn`: for the optimizers of `sophia_optax`, a `HessianFn`.
      second_order: whether it differentiates `forward.loss`, which does not use a fused attention.
      whole_batch: whether it sees the whole batch instead of `--curvature-batch` sequences of it.
    """

    estimator: Callable[[Forward, Params, Batch], Callable[..., Any]]
    second_order: bool = True
    whole_batch: bool = False


def gauss_newton(
    forward: Forward, params: Params, batch: Batch, **options: Any
) -> sophia_optax.HessianFn:
    """Sophia-G's: one backward pass from labels that are sampled from the model."""
    inputs = batch[:, :-1]
    return sophia_optax.gauss_newton_bartlett(
        lambda p: forward.logits(p, inputs), params, **options
    )


def hutchinson(
    forward: Forward, params: Params, batch: Batch, **options: Any
) -> sophia_optax.HessianFn:
    """Sophia-H's: one Hessian-vector product."""
    return sophia_optax.hutchinson(lambda p: forward.loss(p, batch), params, **options)


def curvature_loss(forward: Forward, params: Params, batch: Batch) -> Callable[[Params], jax.Array]:
    """optax.contrib.sophia's: the loss itself, which that transformation differentiates."""
    return lambda p: forward.loss(p, batch)


GAUSS_NEWTON = Curvature(gauss_newton, second_order=False)
HUTCHINSON = Curvature(hutchinson)

# --- the transformations --------------------------------------------------------------------------


def is_matrix(params: Params) -> Params:
    """True for the params that weight decay is for: all but biases and norms' scales."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(n in jax.tree_util.keystr(path) for n in ("bias", "scale")), params
    )


def adamw(h: Hyperparameters, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW."""
    return optax.adamw(schedule, h.b1, h.b2, weight_decay=h.weight_decay, mask=is_matrix)


def sophia(
    make: Callable[..., optax.GradientTransformationExtraArgs],
    h: Hyperparameters,
    schedule: optax.Schedule,
    target: Callable[[float], Any] = sophia_optax.win_rate_target,
    **options: Any,
) -> optax.GradientTransformation:
    """Sophia-G or Sophia-H, as `make` says; `options` are keywords of that."""
    return make(
        schedule,
        b1=h.b1,
        b2=h.b2,
        gamma=h.gamma if h.win_rate is None else target(h.win_rate),
        update_interval=h.update_interval,
        weight_decay=h.weight_decay,
        mask=is_matrix,
        **options,
    )


def soap(
    h: Hyperparameters, schedule: optax.Schedule, eigenbasis: Mapping[str, Any]
) -> optax.GradientTransformation:
    """SOAP: Adam with Nesterov momentum in the eigenbasis of each matrix."""
    adam = optax.scale_by_adam(h.b1, h.b2, nesterov=True)
    return optax.chain(
        sophia_optax.in_eigenbasis(adam, **eigenbasis),
        optax.add_decayed_weights(h.weight_decay, is_matrix),
        optax.scale_by_learning_rate(schedule),
    )


def contrib_sophia(h: Hyperparameters, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Optax's own Sophia: Hutchinson's estimator with random signs, used a refresh late."""
    tx = optax.contrib.sophia(
        schedule,
        b1=h.b1,
        b2=h.b2,
        gamma=h.gamma,
        update_interval=h.update_interval,
        weight_decay=h.weight_decay,
        weight_decay_mask=is_matrix,
    )

    def update(
        updates: Any, state: Any, params: Any = None, *, hessian_fn: Any, **extra_args: Any
    ) -> Any:
        return tx.update(updates, state, params, obj_fn=hessian_fn)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def lion(h: Hyperparameters, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Lion."""
    return optax.lion(schedule, h.b1, h.b2, weight_decay=h.weight_decay, mask=is_matrix)


# Inputs and outputs of the matrices that Muon makes orthogonal; what else they have are stacks.
MUON_MATRICES = {
    "qkv": ((1,), (3, 4)),
    "out": ((1, 2), (3,)),
    "up": ((1,), (2,)),
    "down": ((1,), (2,)),
}


def map_by_name(fn: Callable[[str, jax.Array], Any], params: Params) -> Any:
    """Maps (a leaf's own name, leaf) over the params: "qkv" is the same in each block."""

    def named(path: Any, leaf: jax.Array) -> Any:
        # The last entry of the path of a `State` is the attribute of nnx.Param that has the array.
        names = [key.key for key in path if isinstance(getattr(key, "key", None), str)]
        return fn(names[-1], leaf)

    return jax.tree_util.tree_map_with_path(named, params)


def muon_dimensions(params: Params) -> Params:
    """Each matrix's inputs and outputs; None for what AdamW takes."""

    def dimensions(name: str, _: jax.Array) -> Any:
        if name not in MUON_MATRICES:
            return None
        return optax.contrib.MuonDimensionNumbers(*MUON_MATRICES[name])

    return map_by_name(dimensions, params)


def basis_options(h: Hyperparameters, stack_sharding: NamedSharding | None) -> dict[str, Any]:
    """What `in_eigenbasis` is told: how often, which matrices, how they are cut, and where."""
    return {
        "basis_interval": h.basis_interval,
        "dimension_numbers": matrix_axes,
        "block_size": 256,
        "stack_sharding": stack_sharding,
    }


def matrix_axes(params: Params) -> Params:
    """The blocks' matrices as for Muon; embeddings are turned on the side of the features."""

    def axes(name: str, _: jax.Array) -> sophia_optax.MatrixAxes | None:
        if name in MUON_MATRICES:
            return sophia_optax.MatrixAxes(*MUON_MATRICES[name])
        if name in ("embedding", "positions"):
            return sophia_optax.MatrixAxes(0, 1, turn="right")
        return None

    return map_by_name(axes, params)


def muon(h: Hyperparameters, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon on the blocks' matrices, AdamW on the rest, at steps of one size."""
    return optax.contrib.muon(
        schedule,
        beta=0.95,
        weight_decay=h.weight_decay,
        weight_decay_mask=is_matrix,
        adam_b1=h.b1,
        adam_b2=h.b2,
        adam_weight_decay=h.weight_decay,
        muon_weight_dimension_numbers=muon_dimensions,
        consistent_rms=0.2,
    )


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Optimizer:
    """A row of the table.

    Attributes:
      build: the transformation, from hyperparameters, a schedule and, where it has a basis, the
        keywords of `in_eigenbasis` as `eigenbasis`.
      tiny: the hyperparameters for the tiny model. Those of AdamW, Sophia-G, Sophia-H and Sophia-H
        with the paper's h are the best of twelve tries each (benchmarks/results/lm_tuning.jsonl).
        Those in the eigenbasis are the best of sixteen at half the batch (lm_race.jsonl).
      large: those for GPT-2, from the paper.
      curvature: how the curvature is estimated, or None for optimizers that take gradients only.
      grid: where tuning starts: the first values of each hyperparameter, which are on the ladders
        of `tune.LADDERS`, in the order in which their neighbours are tried. Those that are not in
        it keep the values of `tiny`. Empty for an optimizer that is not tuned.
      eigenbasis: whether it steps in the eigenbasis of each matrix.
      takes_win_rate: whether its gamma may follow from a win rate.
    """

    build: Callable[..., optax.GradientTransformation]
    tiny: Hyperparameters
    large: Hyperparameters
    curvature: Curvature | None = None
    grid: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    eigenbasis: bool = False
    takes_win_rate: bool = False

    def uses(self, name: str) -> bool:
        """Whether a hyperparameter, or `curvature_batch`, changes anything: others stay unset."""
        if name == "win_rate":
            return self.takes_win_rate
        if name == "update_interval":
            return self.curvature is not None
        if name == "curvature_batch":
            return self.curvature is not None and not self.curvature.whole_batch
        return getattr(self.tiny, name) is not None

    def transformation(
        self,
        h: Hyperparameters,
        schedule: optax.Schedule,
        stack_sharding: NamedSharding | None = None,
    ) -> optax.GradientTransformation:
        """The transformation without clipping; its stacks of matrices are sharded like that."""
        basis = {"eigenbasis": basis_options(h, stack_sharding)} if self.eigenbasis else {}
        return self.build(h, schedule, **basis)


sophia_g = functools.partial(sophia, sophia_optax.sophia_g)
sophia_h = functools.partial(sophia, sophia_optax.sophia_h)

OPTIMIZERS = {
    "adamw": Optimizer(
        adamw,
        tiny=Hyperparameters(1e-2, b1=0.8, b2=0.95, weight_decay=0.1, warmup=0.1),
        large=Hyperparameters(6e-4, b1=0.9, b2=0.95, weight_decay=0.1, warmup=0.02),
        grid={
            "learning_rate": (8e-3, 1.5e-2),
            "b1": (0.8, 0.9),
            "warmup": (0.05, 0.1),
            "b2": (0.95,),
        },
    ),
    "sophia_g": Optimizer(
        sophia_g,
        takes_win_rate=True,
        tiny=Hyperparameters(4e-3, b1=0.8, b2=0.99, gamma=0.2, weight_decay=0.1, warmup=0.2),
        large=Hyperparameters(4e-4, b1=0.965, b2=0.99, gamma=0.05, weight_decay=0.2, warmup=0.02),
        curvature=GAUSS_NEWTON,
        grid={
            "learning_rate": (3e-3, 6e-3),
            "gamma": (0.1, 0.5),
            "b1": (0.7, 0.8),
            "warmup": (0.2,),
        },
    ),
    "sophia_h": Optimizer(
        sophia_h,
        takes_win_rate=True,
        tiny=Hyperparameters(1e-2, b1=0.8, b2=0.99, gamma=0.05, weight_decay=0.1, warmup=0.05),
        large=Hyperparameters(4e-4, b1=0.965, b2=0.99, gamma=0.01, weight_decay=0.2, warmup=0.02),
        curvature=HUTCHINSON,
        grid={
            "learning_rate": (4e-3, 8e-3),
            "gamma": (0.02, 0.05),
            "b1": (0.7, 0.8),
            "warmup": (0.05,),
        },
    ),
    # h instead of |h|: a coordinate whose h is negative takes a sign step.
    "sophia_h_paper": Optimizer(
        functools.partial(sophia_h, absolute_curvature=False),
        takes_win_rate=True,
        tiny=Hyperparameters(6e-3, b1=0.7, b2=0.99, gamma=0.02, weight_decay=0.1, warmup=0.2),
        large=Hyperparameters(4e-4, b1=0.965, b2=0.99, gamma=0.01, weight_decay=0.2, warmup=0.02),
        curvature=HUTCHINSON,
        grid={
            "learning_rate": (4e-3, 8e-3),
            "gamma": (0.02, 0.05),
            "b1": (0.7, 0.8),
            "warmup": (0.2,),
        },
    ),
    "sophia_g_eigenbasis": Optimizer(
        sophia_g,
        takes_win_rate=True,
        tiny=Hyperparameters(
            8e-3, b1=0.8, b2=0.95, gamma=0.2, weight_decay=0.1, warmup=0.05, basis_interval=1
        ),
        large=Hyperparameters(
            1e-3, b1=0.9, b2=0.95, gamma=0.5, weight_decay=0.1, warmup=0.02, basis_interval=10
        ),
        curvature=GAUSS_NEWTON,
        grid={
            "learning_rate": (8e-3, 1.5e-2),
            "gamma": (0.2, 0.5),
            "basis_interval": (1, 10),
            "b1": (0.9,),
            "warmup": (0.05,),
        },
        eigenbasis=True,
    ),
    "sophia_h_eigenbasis": Optimizer(
        sophia_h,
        takes_win_rate=True,
        tiny=Hyperparameters(
            8e-3, b1=0.8, b2=0.95, gamma=0.01, weight_decay=0.1, warmup=0.05, basis_interval=1
        ),
        large=Hyperparameters(
            1e-3, b1=0.9, b2=0.95, gamma=0.02, weight_decay=0.1, warmup=0.02, basis_interval=10
        ),
        curvature=HUTCHINSON,
        grid={
            "learning_rate": (8e-3, 1.5e-2),
            "gamma": (0.02, 0.05),
            "basis_interval": (1, 10),
            "b1": (0.8,),
            "warmup": (0.05,),
        },
        eigenbasis=True,
    ),
    "soap": Optimizer(
        soap,
        tiny=Hyperparameters(
            1.5e-2, b1=0.8, b2=0.95, weight_decay=0.1, warmup=0.02, basis_interval=1
        ),
        large=Hyperparameters(
            3e-3, b1=0.95, b2=0.95, weight_decay=0.1, warmup=0.02, basis_interval=10
        ),
        grid={
            "learning_rate": (1e-2, 2e-2),
            "b1": (0.8, 0.9),
            "basis_interval": (1, 10),
            "warmup": (0.05,),
            "b2": (0.95,),
        },
        eigenbasis=True,
    ),
    "contrib_sophia": Optimizer(
        contrib_sophia,
        tiny=Hyperparameters(2e-3, b1=0.9, b2=0.99, gamma=0.02, weight_decay=0.1, warmup=0.2),
        large=Hyperparameters(4e-4, b1=0.965, b2=0.99, gamma=0.01, weight_decay=0.2, warmup=0.02),
        curvature=Curvature(curvature_loss, whole_batch=True),
        grid={
            "learning_rate": (1e-3, 2e-3),
            "gamma": (0.02, 0.1),
            "b1": (0.8, 0.9),
            "warmup": (0.2,),
        },
    ),
    "lion": Optimizer(
        lion,
        tiny=Hyperparameters(1e-3, b1=0.9, b2=0.99, weight_decay=0.1, warmup=0.1),
        large=Hyperparameters(1e-4, b1=0.9, b2=0.99, weight_decay=0.5, warmup=0.02),
        grid={
            "learning_rate": (1e-3, 2e-3),
            "b1": (0.8, 0.9),
            "warmup": (0.05, 0.1),
            "b2": (0.99,),
        },
    ),
    "muon": Optimizer(
        muon,
        tiny=Hyperparameters(1e-2, b1=0.9, b2=0.95, weight_decay=0.1, warmup=0.05),
        large=Hyperparameters(6e-4, b1=0.9, b2=0.95, weight_decay=0.1, warmup=0.02),
    ),
}


def rate_for_width(model: ModelConfig) -> float:
    """The learning rate of matrices of that width, as a part of the tiny model's: 1 / width.

    Yang et al. 2022 (arXiv 2203.03466) derive it for Adam. Narrower models take the tiny one's.
    """
    return min(1.0, MODELS["tiny"].width / model.width)


def hyperparameters(
    config: TrainConfig, row: Optimizer | None = None, model: ModelConfig | None = None
) -> Hyperparameters:
    """The run's hyperparameters: what was set, and the optimizer's defaults for the rest."""
    row, model = row or lookup(OPTIMIZERS, config.optimizer, "optimizer"), model or model_of(config)
    defaults = row.large
    if not config.model.startswith("gpt2"):
        rate = row.tiny.learning_rate * rate_for_width(model)
        defaults = dataclasses.replace(row.tiny, learning_rate=rate)
    fields = [f.name for f in dataclasses.fields(Hyperparameters)]
    given = {name: getattr(config, name) for name in fields if getattr(config, name) is not None}
    if "win_rate" in given:
        if "gamma" in given:
            raise UsageError("--gamma and --win-rate set the same thing. Give one of them.")
        given["gamma"] = None
    return dataclasses.replace(defaults, **given)


def check_used(config: Any, optimizers: Sequence[str]) -> None:
    """Tells the user of a hyperparameter that was given and that none of the optimizers uses.

    The part of the batch for the curvature is a setting of the run, which a script may give for
    optimizers with and without curvature.

    Args:
      config: of any command; the hyperparameters that it has no flag for are not given.
      optimizers: names in `OPTIMIZERS`.
    """
    rows = [lookup(OPTIMIZERS, name, "optimizer") for name in optimizers]
    for field_name, default in vars(Hyperparameters()).items():
        given = getattr(config, field_name, default)
        if given == default or any(row.uses(field_name) for row in rows):
            continue
        others = ", ".join(name for name, other in OPTIMIZERS.items() if other.uses(field_name))
        none = f"none of {', '.join(optimizers)} uses it"
        unused = none if len(rows) > 1 else f"{optimizers[0]} does not use it"
        raise UsageError(
            f"{flag(field_name)} is {given}, and {unused}. Leave it out, or choose one of: "
            f"{others}."
        )


def learning_rate(step: Any, peak: Any, warmup: Any, steps: Any) -> jax.Array:
    """Linear warm-up over `warmup * steps` steps, then a cosine down to a twentieth of the peak."""
    rising = jnp.maximum(1.0, jnp.round(jnp.asarray(warmup * steps)))
    falling = jnp.clip((step - rising) / jnp.maximum(steps - rising, 1.0), 0.0, 1.0)
    decayed = 0.05 + 0.95 * 0.5 * (1 + jnp.cos(jnp.pi * falling))
    return peak * jnp.where(step < rising, step / rising, decayed)


def build(
    row: Optimizer, h: Hyperparameters, steps: Any, stack_sharding: NamedSharding | None = None
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """A run's transformation, clipping included, and its learning rate by step.

    The hyperparameters and the number of steps may be traced. `stack_sharding` is that of
    `in_eigenbasis`.
    """
    schedule = functools.partial(learning_rate, peak=h.learning_rate, warmup=h.warmup, steps=steps)
    tx = row.transformation(h, schedule, stack_sharding)
    return optax.chain(optax.clip_by_global_norm(h.clip_norm), tx), schedule
