"""Manual mesh axes: what `jax.shard_map` and `jax.pmap` leave to the function that they map.

Under `jax.shard_map` with its default `check_vma=True`, jax tracks which arrays vary over which
mesh axes, and the derivative in an array that does not vary is summed over the shards. So an
estimator can see what has to be independent, and what has been summed. With `check_vma=False`, and
under `jax.pmap`, jax tracks nothing: the axes that the batch is split over have to be named.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

AxisName: TypeAlias = str | tuple[str, ...]
"""A mesh axis, or several."""


def names(axis_name: AxisName | None) -> tuple[str, ...]:
    """The axes of an argument `axis_name`."""
    if axis_name is None:
        return ()
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def varying(tree: PyTree[Any]) -> tuple[str, ...]:
    """The manual axes over which a leaf of a tree varies, as far as jax tracks that."""
    # Abstract arrays of optax.tree.map_params and others that jax.typeof does not take do not vary.
    types = [jax.typeof(leaf) for leaf in jax.tree.leaves(tree) if isinstance(leaf, _TYPED)]
    return tuple(sorted(set().union(*(getattr(t, "mat", _NONE).varying for t in types))))


def is_tracked(axis: str) -> bool:
    """Whether jax tracks which arrays vary over an axis."""
    return bool(varying(jax.lax.axis_index(axis)))


def untracked() -> tuple[str, ...]:
    """The mesh axes at hand that jax does not track: of `jax.pmap` and of `check_vma=False`."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in axes if not is_tracked(axis))


def fold_in_position(key: PRNGKeyArray, axes: Iterable[str]) -> PRNGKeyArray:
    """A key for each shard along some axes."""
    for axis in axes:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return key


def total(x: Array, axes: Iterable[str]) -> Array:
    """The sum of an array over the shards along some axes."""
    axes = tuple(axes)
    return jax.lax.psum(x, axes) if axes else x


def total_like(x: Array, like: Any) -> Array:
    """The sum over the axes that an array varies over and another one does not."""
    return total(x, sorted(set(varying(x)) - set(varying(like))))


def sum_of_all_shards(parts: list[Array]) -> Array:
    """The sum of arrays, and over the axes that each of them varies over."""
    by_axes: dict[tuple[str, ...], Any] = {}
    for part in parts:
        axes = varying(part)
        by_axes[axes] = by_axes[axes] + part if axes in by_axes else part
    return sum(total(part, axes) for axes, part in by_axes.items())  # pyright: ignore


def sums_of_all_shards(parts: list[Array]) -> Array:
    """The sum of each array over the axes that it varies over, stacked.

    Args:
      parts: arrays of one shape. Those that vary over the same axes communicate once.

    Returns:
      An array with an axis more, the first one.
    """
    return _over_all_shards(jax.lax.psum, parts)


def maxima_of_all_shards(parts: list[Array]) -> Array:
    """The elementwise maximum instead of the sum, otherwise as `sums_of_all_shards`."""
    return _over_all_shards(jax.lax.pmax, parts)


def _over_all_shards(combine: Callable[..., Any], parts: list[Array]) -> Array:
    by_axes: dict[tuple[str, ...], list[int]] = {}
    for place, part in enumerate(parts):
        by_axes.setdefault(varying(part), []).append(place)
    found = []
    for axes, of in by_axes.items():
        stacked = jnp.stack([parts[i] for i in of])
        found.append(combine(stacked, axes) if axes else stacked)
    if len(found) == 1:
        return found[0]
    places = [place for of in by_axes.values() for place in of]
    return jnp.concatenate(found)[jnp.array(sorted(range(len(parts)), key=places.__getitem__))]


def size_on_all_shards(x: Array) -> int:
    """How many coordinates an array has, those of other shards included where it varies."""
    return x.size * math.prod(jax.lax.axis_size(axis) for axis in varying(x))


def vary_like(x: Array, like: Any) -> Array:
    """Lets an array vary over the axes that another one varies over."""
    axes = tuple(sorted(set(varying(like)) - set(varying(x))))
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def check_reduced(estimate_fn: Callable[..., Any], *args: Any) -> None:
    """Checks that an estimate is one of all shards, as far as a trace of it tells.

    Only where jax does not track it, so that nothing else would notice: each replica would step by
    the curvature of its own data, and they would drift apart.

    Args:
      estimate_fn: what makes the estimate.
      *args: its arguments.

    Raises:
      ValueError: if nothing in it communicates over an axis at hand.
    """
    axes = [axis for axis in untracked() if jax.lax.axis_size(axis) > 1]
    if not axes:
        return
    over = _communicated(jax.make_jaxpr(estimate_fn)(*args).jaxpr)
    missing = tuple(axis for axis in axes if axis not in over)
    if missing:
        named = repr(missing[0] if len(missing) == 1 else missing)
        raise ValueError(
            f"The estimate of hessian_fn is not reduced over the mesh axes {missing}, so each "
            "shard would step by the curvature of its own data, and replicas would drift apart. "
            f"Pass axis_name={named} to hutchinson or "
            f"gauss_newton_bartlett, or return jax.lax.pmean(estimate, {named})."
        )


def _communicated(jaxpr: Any) -> set[Any]:
    """The axes that the collectives in a jaxpr, or in those within it, communicate over."""
    if isinstance(jaxpr, tuple | list):
        return set().union(*map(_communicated, jaxpr))
    if not hasattr(jaxpr, "eqns"):
        return set()
    found = set()
    for eqn in jaxpr.eqns:
        found |= _communicated(list(eqn.params.values()))
        axes = eqn.params.get("axes", eqn.params.get("axis_name", ()))
        if eqn.primitive.name not in ("axis_index", "pcast", "pvary"):
            found |= set(axes if isinstance(axes, tuple) else (axes,))
    return found


class _DoesNotVary:
    varying: frozenset[str] = frozenset()


_NONE = _DoesNotVary()
_TYPED = (jax.Array, jax.ShapeDtypeStruct)
