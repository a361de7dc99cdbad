"""Turns, products and bases of the matrices of many parameters, on TPUs in loops over tiles.

XLA for TPU needs seconds to compile one product at the highest precision, and two for each matrix
that QR takes at once. So on TPUs the blocks cut the matrices into tiles, and one loop takes those
of all parameters: a hundred parameters are as many products for the compiler as one. Tiles of
another size have a loop of their own. On other platforms one product takes all matrices of a
parameter.

A loop takes its tiles from anywhere in an array. So `in_loops` is for arrays that each device has
whole, as under `jax.shard_map`.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sophia_optax import _arrays, _eigenbasis
from sophia_optax._eigenbasis import Basis

MATRICES_AT_ONCE = 4
"""How many matrices QR takes at once on TPUs, where these may loop."""


def turn(
    olds: Sequence[Basis | None],
    news: Sequence[Basis | None],
    stacks: Sequence[Float[Array, "_s _i _a _j _b"]],
    in_loops: bool,
) -> list[Array]:
    """Takes the matrices of parameters out of one basis and into another.

    Args:
      olds: the bases that they are in; None stands for their own axes.
      news: the bases to turn them into; None stands for their own axes.
      stacks: the matrices of each parameter, in blocks.
      in_loops: whether TPUs take one tile after another.

    Returns:
      The turned matrices.
    """
    pairs = [
        tuple(basis and basis._replace(left=None, right=None) for basis in pair)
        for pair in zip(olds, news, strict=True)
    ]
    return _by_platform(_turn_each, _turn_tiles, in_loops)(pairs, [*stacks])


def products(
    bases: Sequence[Basis], stacks: Sequence[Float[Array, "_s _i _a _j _b"]], in_loops: bool
) -> list[Basis]:
    """X xᵀ and xᵀ x of each parameter, instead of the factors that there are, and no bases.

    Args:
      bases: of each parameter.
      stacks: the matrices of each parameter, in blocks.
      in_loops: whether TPUs take one tile after another.

    Returns:
      The products.
    """
    factors = [Basis(basis.left, basis.right, None, None) for basis in bases]
    return _by_platform(_products_of_each, _products_of_tiles, in_loops)(factors, [*stacks])


def power_steps(
    factors: Sequence[Float[Array, "_s _n _a _a"]],
    bases: Sequence[Float[Array, "_s _n _a _a"]],
    in_loops: bool,
) -> list[Array]:
    """Takes a step of power iteration for each factor.

    Args:
      factors: of any number of sides.
      bases: the bases before.
      in_loops: whether TPUs take a few matrices after another. If so, all blocks of one size share
        a QR decomposition, otherwise those in stacks of one length.

    Returns:
      The new bases. A block whose factor is zero, or whose new basis is not finite, keeps its own.
    """
    groups: dict[Any, list[int]] = {}
    for index, factor in enumerate(factors):
        length = None if in_loops else factor.shape[0]
        groups.setdefault((length, factor.shape[-1], factor.dtype), []).append(index)
    new = [*bases]
    for members in groups.values():
        own, before = ([sides[i] for i in members] for sides in (factors, bases))
        if in_loops:
            step = _by_platform(_eigenbasis.power_step, _power_step_in_turns, in_loops)
            moved = _split(step(_concatenate(own), _concatenate(before)), own)
        else:
            together = _eigenbasis.power_step(jnp.concatenate(own, 1), jnp.concatenate(before, 1))
            ends = [*itertools.accumulate(factor.shape[1] for factor in own)]
            moved = jnp.split(together, ends[:-1], axis=1)
        for i, basis in zip(members, moved, strict=True):
            new[i] = basis
    return new


def _by_platform(default: Callable[..., Any], tpu: Callable[..., Any], in_loops: bool) -> Any:
    """A function, or on TPUs another one if that may loop."""
    if not in_loops:
        return default
    return functools.partial(jax.lax.platform_dependent, tpu=tpu, default=default)


def _turn_each(pairs: list[Any], stacks: list[Array]) -> list[Array]:
    return [_eigenbasis.turn(old, new, x) for (old, new), x in zip(pairs, stacks, strict=True)]


def _products_of_each(factors: list[Basis], stacks: list[Array]) -> list[Basis]:
    return [_eigenbasis.products(own, x) for own, x in zip(factors, stacks, strict=True)]


def _turn_tiles(pairs: list[Any], stacks: list[Array]) -> list[Array]:
    """As `_turn_each`, in loops."""
    result, cut = [*stacks], [_tiles_of(*own) for own in zip(pairs, stacks, strict=True)]
    for members in _alike(pairs, cut):
        own, tiles = [pairs[i] for i in members], [cut[i] for i in members]
        blocks = jax.tree.map(lambda *sides: _concatenate(sides), *own)

        def turn_one(at: Any, blocks: Any = blocks) -> Array:
            tile, places = at
            old, new = (basis and _at(basis, places) for basis in blocks)
            return _eigenbasis.turn(old, new, tile[None, None, :, None])[0, 0, :, 0]

        turned = jax.lax.map(turn_one, (_concatenate(tiles), _places(tiles)))
        for i, part in zip(members, _split(turned, tiles), strict=True):
            result[i] = _matrices_of(part, stacks[i])
    return result


def _products_of_tiles(factors: list[Basis], stacks: list[Array]) -> list[Basis]:
    """As `_products_of_each`, in loops."""
    result, cut = [*factors], [_tiles_of(*own) for own in zip(factors, stacks, strict=True)]
    for members in _alike(factors, cut):
        own, tiles = [factors[i] for i in members], [cut[i] for i in members]

        def add_one(sums: Basis, at: Any) -> tuple[Basis, None]:
            tile, places = at
            before = _at(sums, places)
            new = _eigenbasis.products(before, tile[None, None, :, None])
            added = jax.tree.map(lambda x, y: (x + y)[0], before, new)
            write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
            return jax.tree.map(write, sums, added, _per_side(sums, places)), None

        zeros = jax.tree.map(lambda *sides: jnp.zeros_like(_concatenate(sides)), *own)
        sums, _ = jax.lax.scan(add_one, zeros, (_concatenate(tiles), _places(tiles)))
        # Of each side, the parts of the members.
        parts = jax.tree.map(lambda total, *sides: _split(total, sides), sums, *own)
        for number, i in enumerate(members):
            result[i] = Basis(*(side and side[number] for side in parts))
    return result


def _power_step_in_turns(factors: Float[Array, "n a a"], bases: Float[Array, "n a a"]) -> Array:
    """As `power_step`, of a few matrices after another."""
    count = factors.shape[0]
    width = next(n for n in range(min(MATRICES_AT_ONCE, count), 0, -1) if count % n == 0)
    turns = [side.reshape(-1, width, *side.shape[1:]) for side in (factors, bases)]
    step = lambda sides: _eigenbasis.power_step(*sides)  # noqa: E731
    return jax.lax.map(step, turns).reshape(bases.shape)


def _alike(
    bases: Sequence[Any], tiles: Sequence[Float[Array, "_s _p _q _c _d"]]
) -> Iterable[list[int]]:
    """The numbers of parameters whose tiles have one size and turn the same sides."""
    kinds: dict[Any, list[int]] = {}
    for number, (own, x) in enumerate(zip(bases, tiles, strict=True)):
        kind = jax.tree.structure(own), x.shape[3:], x.dtype
        kinds.setdefault(kind, []).append(number)
    return kinds.values()


def _tiles_of(bases: Any, x: Float[Array, "s i a j b"]) -> Float[Array, "s p q c d"]:
    """Cuts matrices into tiles.

    Args:
      bases: that turn them, or factors.
      x: the matrices in blocks.

    Returns:
      The tiles. A side that is not turned is cut into pieces as long as the blocks of the other
      one, with zeros at the end.
    """
    stack, _, a, _, b = x.shape
    own = jax.tree.leaves(bases, is_leaf=lambda node: isinstance(node, Basis))
    if all(basis.left is None and basis.left_basis is None for basis in own):
        a = min(a, b)
    if all(basis.right is None and basis.right_basis is None for basis in own):
        b = min(a, b)
    wide = _in_pieces(_in_pieces(x.reshape(stack, x.shape[1] * x.shape[2], -1), 1, a), 3, b)
    return wide.transpose(0, 1, 3, 2, 4)


def _in_pieces(x: Array, axis: int, length: int) -> Array:
    """Cuts an axis into two, with zeros at the end."""
    padded = _arrays.pad_to_multiple(x, axis, length)
    return padded.reshape(*x.shape[:axis], -1, length, *x.shape[axis + 1 :])


def _matrices_of(tiles: Float[Array, "s p q c d"], like: Float[Array, "s i a j b"]) -> Array:
    """Undoes `_tiles_of`."""
    stack, rows, columns, a, b = tiles.shape
    x = tiles.transpose(0, 1, 3, 2, 4).reshape(stack, rows * a, columns * b)
    _, rows, a, columns, b = like.shape
    return x[:, : rows * a, : columns * b].reshape(like.shape)


def _places(tiles: Sequence[Float[Array, "_s _p _q _c _d"]]) -> tuple[Array, Array]:
    """Of each tile, the number of its left and of its right block among all of them."""
    lefts, rights, left, right = [], [], 0, 0
    for x in tiles:
        stack, rows, columns, _, _ = x.shape
        s, i, j = jnp.indices((stack, rows, columns), jnp.int32).reshape(3, -1)
        lefts.append(left + s * rows + i)
        rights.append(right + s * columns + j)
        left, right = left + stack * rows, right + stack * columns
    return jnp.concatenate(lefts), jnp.concatenate(rights)


def _per_side(basis: Basis, places: tuple[Any, Any]) -> Basis:
    """The place of a tile's block for each side that there is."""
    sides = zip(basis, places * 2, strict=True)
    return Basis(*(None if side is None else place for side, place in sides))


def _at(blocks: Basis, places: tuple[Any, Any]) -> Basis:
    """The factors and bases of one tile, as those of a stack of one matrix."""
    take = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=1, axis=0)
    taken = jax.tree.map(take, blocks, _per_side(blocks, places))
    return jax.tree.map(lambda side: side[None], taken)


def _concatenate(arrays: Sequence[Float[Array, "*_s _a _b"]]) -> Float[Array, "n a b"]:
    """All matrices of some arrays, after another."""
    return jnp.concatenate([x.reshape(-1, *x.shape[-2:]) for x in arrays])


def _split(
    matrices: Float[Array, "n a b"], like: Sequence[Float[Array, "*_s _a _b"]]
) -> list[Array]:
    """Undoes `_concatenate`."""
    ends = [*itertools.accumulate(math.prod(x.shape[:-2]) for x in like)]
    parts = jnp.split(matrices, ends[:-1])
    return [part.reshape(x.shape) for part, x in zip(parts, like, strict=True)]
