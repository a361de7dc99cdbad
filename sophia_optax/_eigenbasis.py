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
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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


def turn(old: Basis | None, new: Basis | None, x: Float[Array, "s i a j b"]) -> Array:
    """Takes matrices out of one basis and into another.

    Args:
      old: the basis that they are in; None stands for their own axes.
      new: the basis to turn them into; None stands for their own axes.
      x: the matrices in blocks.

    Returns:
      The turned matrices.
    """
    for basis, (rows, columns) in zip((old, new), (OUT_OF, INTO), strict=True):
        if basis is not None and basis.left_basis is not None:
            x = _einsum(rows, x, basis.left_basis)
        if basis is not None and basis.right_basis is not None:
            x = _einsum(columns, x, basis.right_basis)
    return x


def products(basis: Basis, x: Float[Array, "s i a j b"]) -> Basis:
    """X xᵀ and xᵀ x instead of the factors that there are, and no bases."""
    return Basis(
        left=None if basis.left is None else _einsum("siajb,sicjb->siac", x, x),
        right=None if basis.right is None else _einsum("siajb,siajc->sjbc", x, x),
        left_basis=None,
        right_basis=None,
    )


def _einsum(spec: str, x: Array, y: Array) -> Array:
    """An einsum in the wider dtype, at the highest precision."""
    return jnp.einsum(spec, x, y, precision=_HIGHEST)


def power_step(factor: Float[Array, "*s a a"], basis: Float[Array, "*s a a"]) -> Array:
    """orth(factor @ basis), or the basis where the factor is zero or the new one not finite."""
    trace = jnp.trace(factor, axis1=-2, axis2=-1)[..., None, None]
    known = trace > 0
    # Scaled by the sum of the eigenvalues, so that the squares of tiny factors do not underflow.
    # The shift has the same eigenvectors. It keeps the axes in which the factor is zero, where
    # rounding would choose new ones.
    scaled = jnp.where(known, factor / jnp.where(known, trace, 1.0), 0.0)
    shift = 128 * jnp.finfo(factor.dtype).eps
    moved = _einsum("...ab,...bc->...ac", scaled, basis) + shift * basis
    # The identity where the result is not used: a stack is padded with zeros.
    q = orthonormal(jnp.where(known, moved, jnp.eye(basis.shape[-1], dtype=basis.dtype)))
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
