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

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from sophia_optax import _arrays

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


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """How an array is read as a stack of matrices whose sides are cut into blocks.

    Attributes:
      permutation: the order of the axes: those of the stack, of the rows, of the columns.
      stack_axes: how many of them are stacked.
      shape: of the array.
      view: `[stack, left blocks, left block, right blocks, right block]`.
      turns_left: whether the rows have a basis.
      turns_right: whether the columns have a basis.
    """

    permutation: tuple[int, ...]
    stack_axes: int
    shape: tuple[int, ...]
    view: tuple[int, int, int, int, int]
    turns_left: bool
    turns_right: bool

    def matrices(self, x: Array) -> Float[Array, "s i a j b"]:
        """Views an array as matrices in blocks, in float32 at least."""
        # Under Explicit axes, sharded over the stack where that divides, so that nothing else is
        # communicated until `array`; otherwise every device has all of them.
        wide = x.astype(_arrays.at_least_float32(x.dtype))
        whole = _arrays.reshard(wide, PartitionSpec())
        return self.sharded(whole.transpose(self.permutation).reshape(self.view), x)

    def array(self, matrices: Float[Array, "s i a j b"], like: Array) -> Array:
        """Undoes `matrices`, but for the dtype, in the sharding of the array."""
        whole = _arrays.reshard(matrices, PartitionSpec())
        transposed = whole.reshape([self.shape[axis] for axis in self.permutation])
        inverse = sorted(range(len(self.permutation)), key=self.permutation.__getitem__)
        sharding = _arrays.explicit_sharding(like)
        spec = PartitionSpec() if sharding is None else sharding.spec
        return _arrays.reshard(transposed.transpose(inverse), spec)

    def sharded(self, stack: Array, like: Any) -> Array:
        """Shards a stack over the mesh axes of an array, where it divides."""
        sharding = _arrays.explicit_sharding(like)
        if sharding is None:
            return stack
        names = [name for axes in sharding.spec if axes is not None for name in _tuple(axes)]
        divides = self.view[0] % math.prod(sharding.mesh.shape[name] for name in names) == 0
        spec = PartitionSpec(tuple(names)) if names and divides else PartitionSpec()
        return jax.sharding.reshard(stack, NamedSharding(sharding.mesh, spec))

    def init(self, like: Any) -> Basis:
        """Zero factors, and the identity as bases."""
        stack, left_blocks, left, right_blocks, right = self.view
        dtype = _arrays.at_least_float32(like.dtype)

        def factor(turns: bool, blocks: int, size: int) -> Array | None:
            if not turns:
                return None
            return self.sharded(jnp.zeros((stack, blocks, size, size), dtype), like)

        def identity(turns: bool, blocks: int, size: int) -> Array | None:
            if not turns:
                return None
            eye = jnp.broadcast_to(jnp.eye(size, dtype=dtype), (stack, blocks, size, size))
            return self.sharded(jnp.array(eye), like)

        return Basis(
            left=factor(self.turns_left, left_blocks, left),
            right=factor(self.turns_right, right_blocks, right),
            left_basis=identity(self.turns_left, left_blocks, left),
            right_basis=identity(self.turns_right, right_blocks, right),
        )

    def turn(self, basis: Basis, x: Array) -> Array:
        """Q_Lᵀ x Q_R."""
        z = self.matrices(x)
        if basis.left_basis is not None:
            z = _einsum("siajb,siac->sicjb", z, basis.left_basis)
        if basis.right_basis is not None:
            z = _einsum("siajb,sjbc->siajc", z, basis.right_basis)
        return self.array(z, x)

    def above_rounding(self, z: Array) -> Array:
        """Whether turned numbers are more than the rounding of the products that turned them."""
        # In the array's own shape and sharding: no more than the norms is communicated.
        wide = z.astype(_arrays.at_least_float32(z.dtype))
        axes = self.permutation[self.stack_axes :]
        norm = jnp.sqrt(jnp.sum(jnp.square(wide), axis=axes, keepdims=True))
        rounding = 16 * jnp.finfo(wide.dtype).eps * jnp.where(jnp.isfinite(norm), norm, 0.0)
        return jnp.abs(wide) >= rounding

    def back(self, basis: Basis, z: Array) -> Array:
        """Q_L z Q_Rᵀ."""
        x = self.matrices(z)
        if basis.left_basis is not None:
            x = _einsum("siajb,sica->sicjb", x, basis.left_basis)
        if basis.right_basis is not None:
            x = _einsum("siajb,sjcb->siajc", x, basis.right_basis)
        return self.array(x, z)

    def observe(self, basis: Basis, g: Array, decay: Any) -> tuple[Basis, Bool[Array, ""]]:
        """Averages the products of a gradient into the factors.

        Args:
          basis: the factors before.
          g: the gradient.
          decay: β.

        Returns:
          The new factors, and whether the gradient's squares are finite; the old factors if not.
        """
        x = self.matrices(g)
        products = Basis(
            left=None if basis.left is None else _einsum("siajb,sicjb->siac", x, x),
            right=None if basis.right is None else _einsum("siajb,siajc->sjbc", x, x),
            left_basis=None,
            right_basis=None,
        )
        # Each trace is the sum of the squares of the whole gradient.
        one = products.left if products.left is not None else products.right
        assert one is not None
        finite = jnp.isfinite(jnp.trace(one, axis1=-2, axis2=-1).sum())

        def average(factor: Array | None, product: Array | None) -> Array | None:
            if factor is None or product is None:
                return None
            return jnp.where(finite, decay * factor + (1 - decay) * product, factor)

        left, right = average(basis.left, products.left), average(basis.right, products.right)
        return basis._replace(left=left, right=right), finite


def _tuple(axes: str | tuple[str, ...]) -> tuple[str, ...]:
    """The names of the mesh axes of one dimension."""
    return (axes,) if isinstance(axes, str) else axes


def _einsum(spec: str, x: Array, y: Array) -> Array:
    """An einsum in the wider dtype, at the highest precision."""
    return jnp.einsum(spec, x, y, precision=_HIGHEST)


def refreshed(bases: Sequence[Basis]) -> tuple[Basis, ...]:
    """Takes one step of power iteration for each basis.

    Blocks of one size in stacks of one length share a QR decomposition: XLA for TPU needs 20 CPU
    seconds to compile one for 32 or more matrices of 256 x 256, and no more for hundreds.

    Args:
      bases: factors and bases of each parameter.

    Returns:
      The same factors with new bases. A block whose factor is zero, or whose new basis is not
      finite, keeps its basis.
    """
    factors = jax.tree.leaves([(basis.left, basis.right) for basis in bases])
    old, treedef = jax.tree.flatten([(basis.left_basis, basis.right_basis) for basis in bases])
    groups: dict[Any, list[int]] = {}
    for index, factor in enumerate(factors):
        stack, _, size, _ = factor.shape
        sharding = _arrays.explicit_sharding(factor)
        kind = stack, size, factor.dtype, sharding and sharding.spec
        groups.setdefault(kind, []).append(index)
    new = [*old]
    for members in groups.values():
        together = jnp.concatenate([factors[i] for i in members], axis=1)
        moved = _power_step(together, jnp.concatenate([old[i] for i in members], axis=1))
        ends = itertools.accumulate(factors[i].shape[1] for i in members)
        for i, part in zip(members, jnp.split(moved, [*ends][:-1], axis=1), strict=True):
            new[i] = part
    return tuple(
        basis._replace(left_basis=left, right_basis=right)
        for basis, (left, right) in zip(bases, treedef.unflatten(new), strict=True)
    )


def _power_step(factor: Float[Array, "s i a a"], basis: Float[Array, "s i a a"]) -> Array:
    """orth(factor @ basis), or the basis where the factor is zero or the new one not finite."""
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
