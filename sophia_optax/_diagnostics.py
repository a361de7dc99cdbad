"""Reads the scalars of a run from an optimizer state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from sophia_optax._arrays import is_inexact
from sophia_optax._scale_by_sophia import ScaleBySophiaState


class SophiaDiagnostics(NamedTuple):
    """The scalars of a `ScaleBySophiaState`, for a log.

    Attributes:
      count: the number of updates, `i32[]`.
      refreshes: the number of accepted estimates of the curvature, `i32[]`.
      rejected: the number of estimates that were dropped as not finite, or larger than
        `max_estimate_ratio` allows, `i32[]`. If it grows, the curvature overflows.
      win_rate: the share of coordinates that were not clipped at the last accepted refresh,
        `f32[]`. The paper tunes gamma until it lies between 0.1 and 0.5. Near 0, raise gamma or
        the target.
      gamma: γ of the last update, `f32[]`, fixed or from a `win_rate_target`; the geometric mean
        over the coordinates if the target is per tensor.
    """

    count: Int[Array, "..."]  # pyright: ignore[reportIncompatibleMethodOverride]
    refreshes: Int[Array, "..."]
    rejected: Int[Array, "..."]
    win_rate: Float[Array, "..."]
    gamma: Float[Array, "..."]


def diagnostics(opt_state: PyTree[Any]) -> SophiaDiagnostics:
    """Finds Sophia's state in a nested optimizer state, and returns its scalars.

    It copies nothing to the host, so it can be called inside `jit`.

    Example:
      >>> import jax.numpy as jnp, optax, sophia_optax
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), sophia_optax.sophia_g(1e-3))
      >>> print(sophia_optax.diagnostics(tx.init(jnp.ones(3))).refreshes)
      0

    Args:
      opt_state: the state of an optimizer with one Sophia, for example in a chain or under
        `inject_hyperparams`, `masked`, `partition` or `MultiSteps`.

    Returns:
      The scalars. (Under `vmap` over optimizers they have its axes.)

    Raises:
      ValueError: if there is no state of Sophia, or more than one.
    """
    nodes = jax.tree_util.tree_leaves_with_path(
        opt_state, is_leaf=lambda node: isinstance(node, ScaleBySophiaState)
    )
    found = [(path, node) for path, node in nodes if isinstance(node, ScaleBySophiaState)]
    if not found:
        raise ValueError(
            "The optimizer state holds no ScaleBySophiaState. Pass the state of an optimizer made "
            "with sophia_h, sophia_g or scale_by_sophia."
        )
    if len(found) > 1:
        names = ", ".join(jax.tree_util.keystr(path) for path, _ in found)
        raise ValueError(
            f"The optimizer state holds {len(found)} states of Sophia, at {names}. Pass the part "
            "that has one."
        )
    ((_, state),) = found
    return SophiaDiagnostics(
        _array(state.count),
        _array(state.refreshes),
        _array(state.rejected),
        _array(state.win_rate),
        _mean_gamma(state),
    )


def _array(scalar: Any) -> Any:
    """The array in a leaf of the state: `nnx.Optimizer` wraps each in a variable."""
    (array,) = jax.tree.leaves(scalar)
    return array


def _mean_gamma(state: ScaleBySophiaState) -> Any:
    """The geometric mean of γ over the coordinates; for an abstract state, its shape."""
    gamma, count = _array(state.gamma), _array(state.count)
    if gamma.ndim == count.ndim:
        return gamma
    if isinstance(gamma, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(count.shape, gamma.dtype)
    sizes = [m.size if is_inexact(m) else 0 for m in jax.tree.leaves(state.mu)]
    shares = [size / max(sum(sizes), 1) for size in sizes]  # Python's integers do not overflow
    return jnp.exp(jnp.log(gamma) @ jnp.array(shares, gamma.dtype))
