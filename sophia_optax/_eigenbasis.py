"""The Kronecker eigenbasis of a matrix: its factors, its bases, and the turn into them and back.

For a parameter W (m x n) with gradients G, the eigenvectors Q_L of E[G Gᵀ] and Q_R of E[Gᵀ G] are
axes in which the Hessian is much closer to a diagonal than in W's own (Shampoo, Gupta, Koren and
Singer 2018; SOAP, Vyas et al. 2024, arXiv 2409.11321):

    L <- β L + (1 - β) G Gᵀ        R <- β R + (1 - β) Gᵀ G
    Q_L <- orth(L Q_L)             Q_R <- orth(R Q_R)             a step of power iteration
    turned: Q_Lᵀ G Q_R             back: Q_L Z Q_Rᵀ

The first bases are the identity. A power iteration that starts at the last basis keeps the order of
the axes; a new eigendecomposition would permute them under whatever is averaged in them.

`orth` is Householder's QR on CPUs and TPUs, and three rounds of CholeskyQR on GPUs, where cuSOLVER
takes one matrix of a stack after the other: on an H100, QR of eight 256 x 256 matrices takes 49 ms,
CholeskyQR 1.7 ms. Both are exact to rounding on every factor, thanks to the small multiple of the
basis that a step adds. Without a shift, CholeskyQR is not finite on singular ones. Newton-Schulz
does not converge on factors whose eigenvalues spread over two decades or more
(benchmarks/orthonormalize.py).

All of it is float32, or wider, at the highest precision of the matrix products: the bases are
reported to be wrong with TF32 and bfloat16 products.

XLA for TPU needs seconds to compile one such product, and the longer for QR the more matrices it
takes at once. So on TPUs the products run in loops over the tiles that the blocks cut a matrix
into, and QR in a loop over parts of a batch. No loop may run over an axis that is sharded, so there
are loops only where the layout is known: with a `stack_sharding`, or under Explicit axes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sophia_optax import _arrays, _manual_axes

_HIGHEST = jax.lax.Precision.HIGHEST


class Basis(NamedTuple):
    """Factors and bases of one parameter: stacks of blocks. A side that is not turned has None.

    Attributes:
      left: L, `[stack, left blocks, left block, left block]`.
      right: R, `[stack, right blocks, right block, right block]`.
      left_basis: Q_L, of the shape of L.
      right_basis: Q_R, of the shape of R.
    """

    left: Float[Array, "s i a a"] | None
    right: Float[Array, "s j b b"] | None
    left_basis: Float[Array, "s i a a"] | None
    right_basis: Float[Array, "s j b b"] | None


INTO = "siajb,siac->sicjb", "siajb,sjbc->siajc"
"""Products of rows and columns with the bases of both sides: Q_Lᵀ x Q_R."""

OUT_OF = "siajb,sica->sicjb", "siajb,sjcb->siajc"
"""Q_L x Q_Rᵀ."""


def turn(
    old: Basis | None, new: Basis | None, x: Float[Array, "s i a j b"], by_tiles: bool
) -> Array:
    """Takes matrices out of one basis and into another.

    Args:
      old: the basis that they are in; None stands for their own axes.
      new: the basis to turn them into; None stands for their own axes.
      x: the matrices in blocks.
      by_tiles: whether TPUs take one tile after another.

    Returns:
      The turned matrices.
    """
    bases = old, new
    _, rows, _, columns, _ = x.shape
    if rows == columns == 1 or not by_tiles:
        return _turn(bases, x)

    def one_by_one(bases: tuple[Basis | None, Basis | None], x: Array) -> Array:
        def body(number: Any, result: Array) -> Array:
            i, j = divmod(number, columns)
            old, new = (basis and _blocks(basis, i, j) for basis in bases)
            turned = _turn((old, new), _tile(x, i, j))
            return jax.lax.dynamic_update_slice(result, turned, (0, i, 0, j, 0))

        start = _manual_axes.vary_like(x, jax.eval_shape(_turn, bases, x))
        return jax.lax.fori_loop(0, rows * columns, body, start)

    return jax.lax.platform_dependent(bases, x, tpu=one_by_one, default=_turn)


def _turn(bases: tuple[Basis | None, Basis | None], x: Float[Array, "s i a j b"]) -> Array:
    """As `turn`, of all tiles or of one."""
    for basis, (rows, columns) in zip(bases, (OUT_OF, INTO), strict=True):
        if basis is not None and basis.left_basis is not None:
            x = _einsum(rows, x, basis.left_basis)
        if basis is not None and basis.right_basis is not None:
            x = _einsum(columns, x, basis.right_basis)
    return x


def products(basis: Basis, x: Float[Array, "s i a j b"], by_tiles: bool) -> Basis:
    """X xᵀ and xᵀ x for the sides that have a factor; on TPUs `by_tiles` in a loop over these."""
    _, rows, _, columns, _ = x.shape
    if rows == columns == 1 or not by_tiles:
        return _products(basis, x)

    def one_by_one(basis: Basis, x: Array) -> Basis:
        def body(number: Any, sums: Basis) -> Basis:
            i, j = divmod(number, columns)
            new = _products(basis, _tile(x, i, j))
            added = jax.tree.map(jnp.add, _blocks(sums, i, j), new)
            write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
            return jax.tree.map(write, sums, added, _places(sums, i, j))

        zeros = _arrays.zeros_of(jax.eval_shape(_products, basis, x))
        return jax.lax.fori_loop(0, rows * columns, body, zeros)

    return jax.lax.platform_dependent(basis, x, tpu=one_by_one, default=_products)


def _products(basis: Basis, x: Float[Array, "s i a j b"]) -> Basis:
    return Basis(
        left=None if basis.left is None else _einsum("siajb,sicjb->siac", x, x),
        right=None if basis.right is None else _einsum("siajb,siajc->sjbc", x, x),
        left_basis=None,
        right_basis=None,
    )


def _tile(x: Float[Array, "s i a j b"], i: Any, j: Any) -> Float[Array, "s 1 a 1 b"]:
    """One tile of each matrix."""
    row = jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1)
    return jax.lax.dynamic_slice_in_dim(row, j, 1, axis=3)


def _blocks(basis: Basis, i: Any, j: Any) -> Basis:
    """The factors and bases of one tile."""
    take = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=1, axis=1)
    return jax.tree.map(take, basis, _places(basis, i, j))


def _places(basis: Basis, i: Any, j: Any) -> Basis:
    """The number of a tile's block among those of each side that there is."""
    sides = zip(basis, (i, j, i, j), strict=True)
    return Basis(*(None if side is None else place for side, place in sides))


def _einsum(spec: str, x: Array, y: Array) -> Array:
    """An einsum in the wider dtype, at the highest precision."""
    return jnp.einsum(spec, x, y, precision=_HIGHEST)


def power_step(
    factor: Float[Array, "s i a a"], basis: Float[Array, "s i a a"], at_once: int
) -> Array:
    """orth(factor @ basis), or the basis where the factor is zero or the new one not finite.

    Args:
      factor: the factors.
      basis: the bases before.
      at_once: how many blocks to take at once on TPUs, or fewer if they do not divide; at least
        one.

    Returns:
      The new bases.
    """
    blocks = factor.shape[1]
    width = next(n for n in range(min(max(at_once, 1), blocks), 0, -1) if blocks % n == 0)
    if width == blocks:
        return _power_step(factor, basis)

    def in_turns(factor: Array, basis: Array) -> Array:
        def body(number: Any, result: Array) -> Array:
            start = number * width
            take = functools.partial(
                jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=width, axis=1
            )
            new = _power_step(take(factor), take(basis))
            return jax.lax.dynamic_update_slice_in_dim(result, new, start, axis=1)

        start = _manual_axes.vary_like(basis, jax.eval_shape(_power_step, factor, basis))
        return jax.lax.fori_loop(0, blocks // width, body, start)

    return jax.lax.platform_dependent(factor, basis, tpu=in_turns, default=_power_step)


def _power_step(factor: Float[Array, "s i a a"], basis: Float[Array, "s i a a"]) -> Array:
    """As `power_step`, of all blocks at once."""
    trace = jnp.trace(factor, axis1=-2, axis2=-1)[..., None, None]
    known = jnp.isfinite(trace) & (trace > 0)
    # Scaled by the sum of the eigenvalues, so that the squares of tiny factors do not underflow.
    # The shift has the same eigenvectors. It keeps the axes in which the factor is zero, where
    # rounding would choose new ones.
    scaled = jnp.where(known, factor / jnp.where(known, trace, 1.0), 0.0)
    shift = 128 * jnp.finfo(factor.dtype).eps
    moved = _einsum("...ab,...bc->...ac", scaled, basis) + shift * basis
    q = orthonormal(jnp.where(known, moved, basis))
    return jnp.where(known & jnp.all(jnp.isfinite(q), axis=(-2, -1), keepdims=True), q, basis)


def orthonormal(matrix: Float[Array, "*s a a"]) -> Array:
    """An orthonormal basis of the columns, the first of them parallel to the first column."""
    return jax.lax.platform_dependent(
        matrix, cuda=shifted_cholesky_qr, rocm=shifted_cholesky_qr, default=householder_qr
    )


def householder_qr(matrix: Float[Array, "*s a a"]) -> Array:
    """The Q of a QR decomposition."""
    return jnp.linalg.qr(matrix)[0]


def shifted_cholesky_qr(matrix: Float[Array, "*s a a"]) -> Array:
    """The Q of a QR decomposition by Cholesky factors alone, in three rounds.

    Fukaya et al. 2020 (arXiv 1809.11085), with a smaller shift than theirs. The shift of the first
    round keeps rounding from making the Gram matrix indefinite; two rounds more remove its effect.

    Args:
      matrix: its singular values spread over five decades at most, as those of a power step do.

    Returns:
      Q, of the same shape.
    """
    size, eps = matrix.shape[-1], jnp.finfo(matrix.dtype).eps
    q = matrix
    for shift in (size * eps, 0.0, 0.0):
        gram = _einsum("...ba,...bc->...ac", q, q)
        trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
        lower = jnp.linalg.cholesky(gram + shift * trace * jnp.eye(size, dtype=gram.dtype))
        q = jax.lax.linalg.triangular_solve(lower, q, left_side=False, lower=True, transpose_a=True)
    return q
