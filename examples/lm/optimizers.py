"""The optimizers by name: how each is built, the curvature it asks for, its defaults."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax

import sophia_optax
from examples.lm.config import Hyperparameters, TrainConfig, UsageError, lookup

Params = Any
Batch = jax.Array


@dataclass(frozen=True)
class Forward:
    """The model as functions of its params: what an estimator differentiates.

    Attributes:
      logits: (params, tokens [B, L]) -> [B, L, V]. Its attention may be a fused kernel, which has
        first derivatives alone.
      loss: (params, windows [B, L + 1]) -> scalar, twice differentiable: with XLA's attention.
    """

    logits: Callable[[Params, jax.Array], jax.Array]
    loss: Callable[[Params, Batch], jax.Array]


def no_curvature(forward: Forward, params: Params, batch: Batch) -> dict[str, Any]:
    """For optimizers that take gradients alone."""
    return {}


def gauss_newton(forward: Forward, params: Params, batch: Batch) -> dict[str, Any]:
    """Sophia-G's: one backward pass from labels that the model itself drew."""
    inputs = batch[:, :-1]
    return {
        "hessian_fn": sophia_optax.gauss_newton_bartlett(
            lambda p: forward.logits(p, inputs), params
        )
    }


def hutchinson(forward: Forward, params: Params, batch: Batch) -> dict[str, Any]:
    """Sophia-H's: one Hessian-vector product."""
    return {"hessian_fn": sophia_optax.hutchinson(lambda p: forward.loss(p, batch), params)}


def curvature_loss(forward: Forward, params: Params, batch: Batch) -> dict[str, Any]:
    """optax.contrib.sophia's: the loss itself, on the params that the transform calls it with."""
    return {"obj_fn": lambda p: forward.loss(p, batch)}


# Those that take second derivatives, of `Forward.loss`.
SECOND_ORDER = (hutchinson, curvature_loss)


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
) -> optax.GradientTransformation:
    """Sophia-G or Sophia-H, as `make` says; they differ in the curvature that they are given."""
    return make(
        schedule,
        b1=h.b1,
        b2=h.b2,
        gamma=h.gamma if h.win_rate is None else target(h.win_rate),
        update_interval=h.update_interval,
        weight_decay=h.weight_decay,
        mask=is_matrix,
        absolute_curvature=h.absolute_curvature,
    )


def contrib_sophia(h: Hyperparameters, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Optax's own Sophia: Hutchinson's estimator with random signs, used a refresh late."""
    return optax.contrib.sophia(
        schedule,
        b1=h.b1,
        b2=h.b2,
        gamma=h.gamma,
        update_interval=h.update_interval,
        weight_decay=h.weight_decay,
        weight_decay_mask=is_matrix,
    )


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


def muon_dimensions(params: Params) -> Params:
    """Each matrix's inputs and outputs; None for what AdamW takes."""

    def dimensions(path: Any, _: jax.Array) -> Any:
        name = next((key.key for key in reversed(path) if hasattr(key, "key")), None)
        if name not in MUON_MATRICES:
            return None
        return optax.contrib.MuonDimensionNumbers(*MUON_MATRICES[name])

    return jax.tree_util.tree_map_with_path(dimensions, params)


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


@dataclass(frozen=True)
class Optimizer:
    """A row of the table.

    Attributes:
      build: the transformation, from hyperparameters and a schedule.
      extra_args: what its `update` takes beside the gradients.
      whole_batch: whether its curvature comes from the whole batch rather than a part of it.
      tiny: the hyperparameters for the tiny model, for AdamW, Sophia-G and Sophia-H the best of
        twelve tries each (tune.py, benchmarks/results/lm_tuning.jsonl).
      large: those for GPT-2, from the paper.
    """

    build: Callable[[Hyperparameters, optax.Schedule], optax.GradientTransformation]
    extra_args: Callable[[Forward, Params, Batch], dict[str, Any]]
    tiny: Hyperparameters
    large: Hyperparameters
    whole_batch: bool = False


OPTIMIZERS = {
    "adamw": Optimizer(
        adamw,
        no_curvature,
        tiny=Hyperparameters(1e-2, b1=0.8, b2=0.95, weight_decay=0.1, warmup=0.1),
        large=Hyperparameters(6e-4, b1=0.9, b2=0.95, weight_decay=0.1, warmup=0.02),
    ),
    "sophia_g": Optimizer(
        functools.partial(sophia, sophia_optax.sophia_g),
        gauss_newton,
        tiny=Hyperparameters(4e-3, b1=0.8, b2=0.99, gamma=0.2, weight_decay=0.1, warmup=0.2),
        large=Hyperparameters(4e-4, b1=0.965, b2=0.99, gamma=0.05, weight_decay=0.2, warmup=0.02),
    ),
    "sophia_h": Optimizer(
        functools.partial(sophia, sophia_optax.sophia_h),
        hutchinson,
        tiny=Hyperparameters(6e-3, b1=0.7, b2=0.99, gamma=0.02, weight_decay=0.1, warmup=0.2),
        large=Hyperparameters(4e-4, b1=0.965, b2=0.99, gamma=0.01, weight_decay=0.2, warmup=0.02),
    ),
    "contrib_sophia": Optimizer(
        contrib_sophia,
        curvature_loss,
        tiny=Hyperparameters(2e-3, b1=0.9, b2=0.99, gamma=0.02, weight_decay=0.1, warmup=0.2),
        large=Hyperparameters(4e-4, b1=0.965, b2=0.99, gamma=0.01, weight_decay=0.2, warmup=0.02),
        whole_batch=True,
    ),
    "lion": Optimizer(
        lion,
        no_curvature,
        tiny=Hyperparameters(1e-3, b1=0.9, b2=0.99, weight_decay=0.1, warmup=0.1),
        large=Hyperparameters(1e-4, b1=0.9, b2=0.99, weight_decay=0.5, warmup=0.02),
    ),
    "muon": Optimizer(
        muon,
        no_curvature,
        tiny=Hyperparameters(1e-2, b1=0.9, b2=0.95, weight_decay=0.1, warmup=0.05),
        large=Hyperparameters(6e-4, b1=0.9, b2=0.95, weight_decay=0.1, warmup=0.02),
    ),
}


def hyperparameters(config: TrainConfig) -> Hyperparameters:
    """The run's hyperparameters: what was set, and the optimizer's defaults for the rest."""
    row = lookup(OPTIMIZERS, config.optimizer, "optimizer")
    defaults = row.large if config.model.startswith("gpt2") else row.tiny
    fields = [f.name for f in dataclasses.fields(Hyperparameters)]
    given = {name: getattr(config, name) for name in fields if getattr(config, name) is not None}
    if "win_rate" in given:
        if "gamma" in given:
            raise UsageError("--gamma and --win-rate set the same thing. Give one of them.")
        given["gamma"] = None
    return dataclasses.replace(defaults, **given)


def learning_rate_schedule(h: Hyperparameters, steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    warmup = max(1, round(h.warmup * steps))
    return optax.warmup_cosine_decay_schedule(
        0.0, h.learning_rate, warmup, max(steps, warmup + 1), 0.05 * h.learning_rate
    )


def build(
    config: TrainConfig,
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """The run's transformation, clipping included, and its learning rate by step."""
    h = hyperparameters(config)
    schedule = learning_rate_schedule(h, config.steps)
    row = lookup(OPTIMIZERS, config.optimizer, "optimizer")
    clip = optax.clip_by_global_norm(h.clip_norm)
    return optax.chain(clip, row.build(h, schedule)), schedule
