"""Selects the data of the curvature: a part of a batch, or one of several mini-steps."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray, PyTree

from sophia_optax import _arrays, _checks, _trees
from sophia_optax._types import HessianFn, Params


def curvature_batch(batch: PyTree[Any], size: int) -> PyTree[Any]:
    """Selects every (B / size)-th example of a batch for the curvature.

    An estimate on a part of the batch costs that part. The paper uses 32 of 480 sequences for
    Sophia-H and 240 for Sophia-G. If the batch is sharded over its first axis and `size` is a
    multiple of the shards, each device keeps some of its own examples and nothing is communicated.
    The first `size` rows would all be on a few devices.

    Example:
      >>> import jax.numpy as jnp, sophia_optax
      >>> print(sophia_optax.curvature_batch({"x": jnp.arange(8)}, 2))
      {'x': Array([0, 4], dtype=int32)}

    Args:
      batch: a pytree of arrays `[B, ...]`.
      size: the number of examples. With fewer than that, as in the last batch of an epoch, the
        whole batch is taken. If it does not divide B, a sharded batch is communicated.

    Returns:
      A pytree of arrays `[min(size, B), ...]`.

    Raises:
      TypeError: if `size` is not a number.
      ValueError: if `size` is below 1 or has a fraction, the leaves' first axes differ, or, under
        Explicit axes, a shard would be left without an example.
    """
    size = _checks.static_count("size", size)
    flat = jax.tree_util.tree_leaves_with_path(batch)
    length = jnp.shape(flat[0][1])[0] if flat and jnp.ndim(flat[0][1]) else 0
    for path, leaf in flat:
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != length:
            raise ValueError(
                f"The batch has shape {jnp.shape(leaf)} at {_trees.name_of(path)}, but its leaves "
                f"must share their first axis, and that of {_trees.name_of(flat[0][0])} is "
                f"{length}. Pass only arrays with an axis of examples."
            )
    size = min(size, length)

    def every(leaf: Any) -> Any:
        shards = _shards_of_first_axis(leaf)
        if size % shards:
            raise ValueError(
                f"size is {size}, but the examples lie on {shards} shards, some of which would "
                "have none of these. Choose a multiple of the shards."
            )
        if leaf.size == 0 or length == size:
            return leaf[:size]
        if length % size == 0:  # a slice, in which each shard of a sharded batch keeps its own
            return leaf.reshape(size, -1, *leaf.shape[1:])[:, 0]
        # Of Python's integers: the products overflow those of 32 bits.
        return leaf[jnp.array([place * length // size for place in range(size)])]

    return jax.tree.map(every, batch)


def _shards_of_first_axis(leaf: Any) -> int:
    """The number of shards of an array's first axis, if its type has a sharding."""
    sharding = _arrays.explicit_sharding(leaf)
    axes = sharding.spec[0] if sharding is not None and len(sharding.spec) else None
    if sharding is None or axes is None:
        return 1
    names = axes if isinstance(axes, tuple) else (axes,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def on_emit(
    hessian_fn: HessianFn,
    multi_steps_state: optax.MultiStepsState,
    every_k: int | Callable[[Any], Any],
) -> HessianFn:
    """Makes one estimate per refresh under `optax.MultiSteps`.

    `MultiSteps` calls the optimizer on every mini-step and keeps the result of the last one.
    Without `on_emit`, a step with a refresh estimates the curvature `every_k` times.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sophia_optax
      >>> loss_fn = lambda x: jnp.sum(x**2)
      >>> tx = optax.MultiSteps(sophia_optax.sophia_h(0.1), every_k_schedule=4)
      >>> x = jnp.ones(3)
      >>> state = tx.init(x)
      >>> hessian_fn = sophia_optax.on_emit(sophia_optax.hutchinson(loss_fn, x), state, 4)
      >>> updates, state = tx.update(jax.grad(loss_fn)(x), state, x, hessian_fn=hessian_fn)

    Args:
      hessian_fn: the estimator, on the data of the mini-step.
      multi_steps_state: the state that the `update` of `MultiSteps` is called with.
      every_k: the `every_k_schedule` of `MultiSteps`.

    Returns:
      A `HessianFn` that calls `hessian_fn` on the mini-step that emits. On the others it returns
      NaN, which `MultiSteps` discards. With a wrong `every_k` no estimate is used, and each counts
      as `rejected` in `diagnostics`.

    Raises:
      TypeError: if the state is not one of `MultiSteps`.
      ValueError: if `every_k` is below 1.
    """
    if not isinstance(multi_steps_state, optax.MultiStepsState):
        raise TypeError(
            f"multi_steps_state is a {type(multi_steps_state).__name__}. Pass the MultiStepsState "
            "that update is called with."
        )
    if not callable(every_k):
        _checks.check_interval("every_k", every_k)
    k = every_k(multi_steps_state.gradient_step) if callable(every_k) else every_k

    def hessian_fn_on_emit(key: PRNGKeyArray, /, **coordinates: Any) -> Params:
        estimate = functools.partial(hessian_fn, **coordinates)
        return jax.lax.cond(
            multi_steps_state.mini_step == k - 1,
            estimate,
            # With a wrong every_k these would be used: NaN is rejected, and zeros would shrink h.
            lambda key: jax.tree.map(
                _arrays.nan_like, _arrays.zeros_of(jax.eval_shape(estimate, key))
            ),
            key,
        )

    return hessian_fn_on_emit
