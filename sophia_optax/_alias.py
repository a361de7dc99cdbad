"""`sophia_h` and `sophia_g`: the transform with weight decay and a learning rate."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import optax
from jax.typing import DTypeLike

from sophia_optax import _checks, _trees
from sophia_optax._hutchinson import hutchinson
from sophia_optax._in_eigenbasis import in_eigenbasis
from sophia_optax._scale_by_sophia import FLOAT32, Gamma, scale_by_sophia
from sophia_optax._types import HessianFn, LossFn, Params, Scalar
from sophia_optax._win_rate_target import win_rate_target

Eigenbasis: TypeAlias = bool | Mapping[str, Any]
"""Whether to step in the eigenbasis, or with what keywords of `in_eigenbasis`."""

Mask: TypeAlias = Any
"""A pytree of booleans, a prefix of the params, or a callable from params to one."""

GAMMA_G = win_rate_target(0.8, weighted=True)

_PAPER = {
    "b1": 0.96,
    "b2": 0.99,
    "eps": 1e-12,
    "clip_threshold": 1.0,
    "update_interval": 10,
    "weight_decay": 0.2,
    "bias_correction": False,
    "absolute_curvature": False,
}

PAPER: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sophia_g": MappingProxyType({**_PAPER, "gamma": 0.05}),
        "sophia_h": MappingProxyType({**_PAPER, "gamma": 0.01}),
    }
)
"""The paper's hyperparameters and its algorithm, as keywords of `sophia_g` and of `sophia_h`.

Use `sophia_g(learning_rate, **PAPER["sophia_g"])`. They are for GPT-2 and 100,000 steps and more
(Liu et al. 2023, section 3.1). The authors' code has b1 = 0.965. `bias_correction=False` and
`absolute_curvature=False` undo what this library changes of the algorithm.
"""


def sophia_h(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-12,
    gamma: Gamma = 0.02,
    clip_threshold: Scalar | None = 1.0,
    update_interval: Scalar = 10,
    weight_decay: Scalar = 1e-4,
    mask: Mask | None = None,
    *,
    bias_correction: bool = True,
    absolute_curvature: bool = True,
    nesterov: bool | None = None,
    eigenbasis: Eigenbasis = False,
    max_estimate_ratio: Scalar | None = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = FLOAT32,
    seed: Scalar = 0,
) -> optax.GradientTransformationExtraArgs:
    """Sophia with the curvature of Hutchinson's estimator.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sophia_optax
      >>> loss_fn = lambda x: jnp.sum(jnp.array([1.0, 100.0]) * x**2)
      >>> tx = sophia_optax.sophia_h(learning_rate=0.1, b1=0.8, gamma=1.0)
      >>> @jax.jit
      ... def train_step(x, state):
      ...     loss, grads = jax.value_and_grad(loss_fn)(x)
      ...     hessian_fn = sophia_optax.hutchinson(loss_fn, x)
      ...     updates, state = tx.update(grads, state, x, hessian_fn=hessian_fn)
      ...     return optax.apply_updates(x, updates), state, loss
      >>> x = jnp.ones(2)
      >>> state = tx.init(x)
      >>> for step in range(41):
      ...     x, state, loss = train_step(x, state)
      ...     if step % 10 == 0:
      ...         print(f"{loss:.2f}")
      101.00
      21.06
      0.31
      0.09
      0.03

    The arguments are those of `scale_by_sophia`, and:

    - `learning_rate`: η, a number or an Optax schedule. With the clip at 1 it is the largest step
      of a coordinate. The paper takes 0.8 of AdamW's for GPT-2 sizes.
    - `b1` and `gamma`: the defaults are those that needed a learning rate alone in short runs
      (`benchmarks/defaults.py`). `PAPER["sophia_h"]` has the paper's b1 = 0.96 and γ = 0.01.
    - `weight_decay`: λ, decoupled, at least 0. Default: Optax's for AdamW; for language models 0.1
      to 0.2 is common (the paper: 0.2).
    - `mask`: which params decay, as in `optax.adamw`.
    - `nesterov`: None is True with `eigenbasis`, which was measured with it, and False without.
    - `eigenbasis`: whether each matrix takes its steps in its Kronecker eigenbasis. True, or a
      mapping of keywords for `in_eigenbasis`. It is ours, not the paper's.

    Returns:
      A transformation whose `update(grads, state, params, hessian_fn=...)` needs the params.
      Instead of `hessian_fn`, it takes `obj_fn`, params to loss, as `optax.contrib.sophia` does,
      and makes one Rademacher probe of it. `refresh` is as in `scale_by_sophia`.

    Raises:
      TypeError: if a hyperparameter is a callable or not a number.
      ValueError: if a hyperparameter is out of its range.
    """
    scale = _scale(
        eigenbasis,
        nesterov,
        b1=b1,
        b2=b2,
        eps=eps,
        gamma=gamma,
        clip_threshold=clip_threshold,
        update_interval=update_interval,
        bias_correction=bias_correction,
        absolute_curvature=absolute_curvature,
        max_estimate_ratio=max_estimate_ratio,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        seed=seed,
    )
    return _accept_obj_fn(_with_decay_and_rate(scale, learning_rate, weight_decay, mask))


def sophia_g(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-12,
    gamma: Gamma = GAMMA_G,
    clip_threshold: Scalar | None = 1.0,
    update_interval: Scalar = 10,
    weight_decay: Scalar = 1e-4,
    mask: Mask | None = None,
    *,
    bias_correction: bool = True,
    absolute_curvature: bool = True,
    nesterov: bool | None = None,
    eigenbasis: Eigenbasis = False,
    max_estimate_ratio: Scalar | None = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = FLOAT32,
    seed: Scalar = 0,
) -> optax.GradientTransformationExtraArgs:
    """Sophia with the curvature of the Gauss-Newton-Bartlett estimator.

    It is `sophia_h` but for the default of gamma and for `obj_fn`, which it cannot take: the
    estimator needs the model's outputs, not its loss.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sophia_optax
      >>> features = jax.random.normal(jax.random.key(0), (64, 8))
      >>> labels = jnp.argmax(features[:, :3], axis=-1)
      >>> logits_fn = lambda w: features @ w
      >>> def loss_fn(w):
      ...     losses = optax.softmax_cross_entropy_with_integer_labels(logits_fn(w), labels)
      ...     return losses.mean()
      >>> tx = sophia_optax.sophia_g(learning_rate=0.1)
      >>> @jax.jit
      ... def train_step(w, state):
      ...     loss, grads = jax.value_and_grad(loss_fn)(w)
      ...     hessian_fn = sophia_optax.gauss_newton_bartlett(logits_fn, w)
      ...     updates, state = tx.update(grads, state, w, hessian_fn=hessian_fn)
      ...     return optax.apply_updates(w, updates), state, loss
      >>> w = jnp.zeros((8, 3))
      >>> state = tx.init(w)
      >>> for step in range(41):
      ...     w, state, loss = train_step(w, state)
      ...     if step % 10 == 0:
      ...         print(f"{loss:.2f}")
      1.10
      0.55
      0.30
      0.17
      0.11

    The arguments are those of `sophia_h`. The defaults of `b1` and `gamma` are those that needed a
    learning rate alone in `benchmarks/defaults.py`: γ follows from a win rate of 0.8, in which each
    coordinate counts by the square of its momentum. Pass a number as `gamma` with
    `clip_threshold=None`, where there is no win rate. `PAPER["sophia_g"]` has the paper's b1 = 0.96
    and γ = 0.05. This estimator's h is never negative, so that `absolute_curvature` makes no
    difference.

    Returns:
      A transformation whose `update(grads, state, params, hessian_fn=...)` needs the params.
      `refresh` is as in `scale_by_sophia`.

    Raises:
      TypeError: if a hyperparameter is a callable or not a number.
      ValueError: if a hyperparameter is out of its range.
    """
    scale = _scale(
        eigenbasis,
        nesterov,
        b1=b1,
        b2=b2,
        eps=eps,
        gamma=gamma,
        clip_threshold=clip_threshold,
        update_interval=update_interval,
        bias_correction=bias_correction,
        absolute_curvature=absolute_curvature,
        max_estimate_ratio=max_estimate_ratio,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        seed=seed,
    )
    return _with_decay_and_rate(scale, learning_rate, weight_decay, mask)


def _scale(
    eigenbasis: Eigenbasis, nesterov: bool | None, **keywords: Any
) -> optax.GradientTransformationExtraArgs:
    """Makes `scale_by_sophia`, in the eigenbasis if that is asked for.

    Args:
      eigenbasis: as in `sophia_h`.
      nesterov: as in `sophia_h`.
      **keywords: the other arguments of `scale_by_sophia`.

    Returns:
      The transformation.

    Raises:
      TypeError: if `eigenbasis` is neither a boolean nor a mapping.
    """
    if not isinstance(eigenbasis, bool | Mapping):
        raise TypeError(
            f"eigenbasis is {eigenbasis!r}. Pass True, False, or a mapping of keywords for "
            "in_eigenbasis, e.g. dict(basis_interval=1)."
        )
    on = eigenbasis is not False
    scale = scale_by_sophia(**keywords, nesterov=on if nesterov is None else nesterov)
    if not on:
        return scale
    return in_eigenbasis(scale, **({} if eigenbasis is True else eigenbasis))


def _with_decay_and_rate(
    scale: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Scalar,
    mask: Mask | None,
) -> optax.GradientTransformationExtraArgs:
    """Chains decoupled weight decay and the learning rate after the scaling.

    The result moves no integer leaf, where `optax.adamw` lets the decay round one away.

    Args:
      scale: the transformation before them.
      learning_rate: a number or a schedule.
      weight_decay: a number.
      mask: which params decay.

    Returns:
      The chain, whose update needs the params.

    Raises:
      ValueError: if a number is out of its range.
    """
    _checks.check_number("weight_decay", weight_decay, 0, float("inf"), "[0, ∞)")
    if not callable(learning_rate):
        _checks.check_number("learning_rate", learning_rate, 0, float("inf"), "[0, ∞)")
    chain = optax.chain(
        scale,
        optax.add_decayed_weights(cast(Any, weight_decay), mask),
        optax.scale_by_learning_rate(learning_rate),
    )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError(
                "update was called without params, which weight decay needs. Call "
                "update(grads, state, params, hessian_fn=...)."
            )
        moved, state = chain.update(updates, state, params, **extra_args)
        return _trees.cast_updates(moved, updates, params), state

    return optax.GradientTransformationExtraArgs(chain.init, update)


def _accept_obj_fn(
    tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Makes a Hutchinson estimator of `obj_fn`, the argument that optax.contrib.sophia takes."""

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: Params | None = None,
        *,
        hessian_fn: HessianFn | None = None,
        obj_fn: LossFn | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if obj_fn is not None:
            if hessian_fn is not None:
                raise ValueError("update got both hessian_fn and obj_fn. Pass one of them.")
            if _trees.is_masked(params):
                raise ValueError(
                    "obj_fn would be called on params that optax.masked or optax.partition has "
                    "masked. Pass hessian_fn=sophia_optax.hutchinson(loss_fn, params) instead, "
                    "which closes over all of them."
                )
            hessian_fn = hutchinson(obj_fn, params)
        return tx.update(updates, state, params, hessian_fn=hessian_fn, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)
