"""Which axes of which parameters make up matrices, and which sides of these have a basis."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from sophia_optax import _arrays, _checks, _manual_axes, _trees
from sophia_optax._matrix_view import MatrixView
from sophia_optax._types import Params


class MatrixAxes(NamedTuple):
    """Which axes of a parameter make up the sides of a matrix, and which sides have a basis.

    `optax.contrib.MuonDimensionNumbers` is taken as well, with both sides turned.

    Attributes:
      left: axes of the rows.
      right: axes of the columns. The remaining axes are stacked: a matrix each.
      turn: which sides have a basis. For an embedding `[vocabulary, features]`, "right" leaves the
        vocabulary in its own axes.
    """

    left: int | tuple[int, ...] = -2
    right: int | tuple[int, ...] = -1
    turn: Literal["both", "left", "right"] = "both"


DimensionNumbers: TypeAlias = Any
"""A pytree like the params of `MatrixAxes`, `optax.contrib.MuonDimensionNumbers` or None (not
turned), or a callable from params to one."""


def matrix_views(
    params: Params,
    dimension_numbers: DimensionNumbers,
    max_size: int,
    block_size: int | None,
    stack_sharding: NamedSharding | None = None,
) -> list[MatrixView | None]:
    """Decides how each leaf is read as matrices; None for one that stays in its own axes.

    Args:
      params: the params, or a tree like them.
      dimension_numbers: as in `in_eigenbasis`.
      max_size: the longest side that is turned.
      block_size: the largest block.
      stack_sharding: as in `in_eigenbasis`.

    Returns:
      A view for each leaf that is not absent.

    Raises:
      TypeError: if dimension numbers are something else.
      ValueError: if they do not fit the params.
    """
    # A tree of dimension numbers is one of all params, of which optax.masked takes some out.
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_trees.is_absent)
    numbers = _last_two_axes if dimension_numbers is None else dimension_numbers
    tree = numbers(params) if callable(numbers) else numbers
    try:
        axes = treedef.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            f"dimension_numbers do not have the structure of the params: {error}. Pass a tree "
            "with MatrixAxes or None for each parameter, or a function that makes it."
        ) from error

    def view(path: Any, leaf: Any, own: Any) -> MatrixView | None:
        if own is None or not _arrays.is_inexact(leaf) or _arrays.is_complex(leaf):
            return None
        if not isinstance(own, MatrixAxes | optax.contrib.MuonDimensionNumbers):
            raise TypeError(
                f"The dimension numbers of {_trees.name_of(path)} are {own!r}. Pass MatrixAxes, "
                "MuonDimensionNumbers or None."
            )
        if isinstance(own, optax.contrib.MuonDimensionNumbers):
            own = MatrixAxes(cast(Any, own.reduction_axis), cast(Any, own.output_axis))
        left, right = ((a,) if isinstance(a, int) else tuple(a) for a in own[:2])
        ndim = jnp.ndim(leaf)
        axes = [axis % ndim if -ndim <= axis < ndim else ndim for axis in (*left, *right)]
        if ndim in axes or len(set(axes)) < len(axes):
            raise ValueError(
                f"The dimension numbers of {_trees.name_of(path)} are {own}, which do not fit its "
                f"shape {jnp.shape(leaf)}. Name each axis at most once, from {-ndim} to {ndim - 1}."
            )
        _checks.check_choice("turn", own.turn, ("both", "left", "right"))
        found = matrix_view(
            jnp.shape(leaf),
            left,
            right,
            turns=(own.turn != "right", own.turn != "left"),
            max_size=max_size,
            block_size=block_size,
            stack_sharding=stack_sharding,
        )
        sharding = _arrays.explicit_sharding(leaf)
        if found is None or sharding is None:
            return found
        names = [name for axes in sharding.spec for name in _manual_axes.names(axes)]
        divides = found.view[0] % math.prod(sharding.mesh.shape[name] for name in names) == 0
        spec = PartitionSpec(tuple(names)) if names and divides else PartitionSpec()
        return dataclasses.replace(found, explicit=NamedSharding(sharding.mesh, spec))

    each = zip(flat, axes, strict=True)
    return [view(path, leaf, own) for (path, leaf), own in each if not _trees.is_absent(leaf)]


def _last_two_axes(params: Params) -> DimensionNumbers:
    """The dimension numbers where none are given."""
    return jax.tree.map(lambda leaf: MatrixAxes() if jnp.ndim(leaf) >= 2 else None, params)


def matrix_view(
    shape: Sequence[int],
    left: Sequence[int],
    right: Sequence[int],
    *,
    turns: tuple[bool, bool] = (True, True),
    max_size: int,
    block_size: int | None,
    stack_sharding: NamedSharding | None = None,
) -> MatrixView | None:
    """Decides how an array is read as matrices.

    Args:
      shape: of the array.
      left: the axes that make up the rows.
      right: the axes that make up the columns. All others are stacked.
      turns: whether rows and columns may have a basis.
      max_size: the longest side that has one.
      block_size: the largest block that a side is cut into; None does not cut.
      stack_sharding: how a stack of matrices is spread over the devices.

    Returns:
      The view, or None where no side has a basis.
    """
    ndim = len(shape)
    left, right = ([axis % ndim for axis in axes] for axes in (left, right))
    stack = [axis for axis in range(ndim) if axis not in (*left, *right)]
    rows, columns = (math.prod(shape[axis] for axis in axes) for axes in (left, right))
    sides = [may and 1 < size <= max_size for may, size in zip(turns, (rows, columns), strict=True)]
    if not any(sides) or 0 in shape:
        return None
    row_block, column_block = (
        _block(size, block_size) if turns_side else size
        for turns_side, size in zip(sides, (rows, columns), strict=True)
    )
    return MatrixView(
        permutation=(*stack, *left, *right),
        stack_axes=len(stack),
        shape=tuple(shape),
        view=(
            math.prod(shape[axis] for axis in stack),
            rows // row_block,
            row_block,
            columns // column_block,
            column_block,
        ),
        turns_left=sides[0],
        turns_right=sides[1],
        stack_sharding=stack_sharding,
    )


def _block(size: int, block_size: int | None) -> int:
    """Decides how long the blocks of a side are.

    Args:
      size: of the side.
      block_size: the longest block, or None.

    Returns:
      The largest divisor of the side up to the block size. The side itself where that is below a
      quarter of the block size, or one: a basis of one axis turns nothing.
    """
    if block_size is None or size <= block_size:
        return size
    block = next(b for b in range(block_size, 0, -1) if size % b == 0)
    return block if block > 1 and 4 * block >= block_size else size
