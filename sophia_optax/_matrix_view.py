"""How arrays are read as stacks of matrices in blocks, and where these are turned.

Under Explicit axes the sharding is part of an array's type, and matrices are spread as the params
are. Under Auto axes they are where a `stack_sharding` puts them. Either way a stack is spread over
the devices, each of which turns its own matrices, so that nothing is communicated but the arrays.
Under Auto axes without one the compiler decides, and gathers and adds far more.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from sophia_optax import _arrays
from sophia_optax._eigenbasis import Basis, power_step, products, turn

MATRICES_AT_ONCE = 4
"""How many matrices a device orthonormalizes at once where it can take them in turns."""


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
      stack_sharding: how a stack is spread over the devices under Auto axes, the sharding of its
        one axis; None leaves that to the compiler.
    """

    permutation: tuple[int, ...]
    stack_axes: int
    shape: tuple[int, ...]
    view: tuple[int, int, int, int, int]
    turns_left: bool
    turns_right: bool
    stack_sharding: NamedSharding | None = None

    def matrices(self, x: Array) -> Float[Array, "s i a j b"]:
        """Views an array as matrices in blocks, in float32 at least."""
        # Under Explicit axes, sharded over the stack where that divides, so that nothing else is
        # communicated until `array`; otherwise every device has all of them.
        wide = self.spread(x.astype(_arrays.at_least_float32(x.dtype)), self.spread_axis_of_array)
        whole = _arrays.reshard(wide, PartitionSpec())
        view = self.sharded(whole.transpose(self.permutation).reshape(self.view), x)
        return self.spread(view, self.spread_axis)

    def array(self, matrices: Float[Array, "s i a j b"], like: Array) -> Array:
        """Undoes `matrices`, but for the dtype, in the sharding of the array."""
        whole = _arrays.reshard(self.spread(matrices, self.spread_axis), PartitionSpec())
        transposed = whole.reshape([self.shape[axis] for axis in self.permutation])
        inverse = sorted(range(len(self.permutation)), key=self.permutation.__getitem__)
        sharding = _arrays.explicit_sharding(like)
        spec = PartitionSpec() if sharding is None else sharding.spec
        array = _arrays.reshard(transposed.transpose(inverse), spec)
        return self.spread(array, self.spread_axis_of_array)

    @property
    def spread_axis(self) -> int | None:
        """The axis of `view` that `stack_sharding` cuts; None where every device has all.

        That is the stack, or of a single matrix the side that is not turned, or the blocks of a
        side.
        """
        stack, left_blocks, _, right_blocks, _ = self.view
        if stack > 1:
            return 0
        if not self.turns_left:
            return 2
        if not self.turns_right:
            return 4
        if max(left_blocks, right_blocks) > 1:
            return 1 if left_blocks >= right_blocks else 3
        return None

    @property
    def spread_axis_of_array(self) -> int | None:
        """The axis of the array that is cut with `spread_axis`; None where no axis is."""
        sides = len(self.permutation) - self.stack_axes
        if self.spread_axis == 0:
            first = self.permutation[0]
            length, stack = self.shape[first], self.view[0]
            # Only where each device then has whole slices of the first axis.
            slices = _part(length, self.shards) * (stack // length)
            return first if slices == _part(stack, self.shards) else None
        if self.spread_axis in (2, 4) and sides == 2:
            return self.permutation[-2 if self.spread_axis == 2 else -1]
        return None

    @property
    def shards(self) -> int:
        """In how many parts `stack_sharding` cuts an axis; 1 without one."""
        if self.stack_sharding is None:
            return 1
        names = _tuple(self.stack_sharding.spec[0])
        return math.prod(self.stack_sharding.mesh.shape[name] for name in names)

    def spread(self, x: Array, axis: int | None) -> Array:
        """Cuts an axis of an array as `stack_sharding` says, under Auto axes; None cuts none."""
        if self.stack_sharding is None or _arrays.explicit_sharding(x) is not None:
            return x
        mesh, spec = self.stack_sharding.mesh, self.stack_sharding.spec
        cut = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, *spec)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, cut))

    def spread_basis(self, basis: Basis) -> Basis:
        """Cuts factors and bases over the devices as the matrices are cut."""

        def spread(side: Array | None, block_axis: int) -> Array | None:
            if side is None:
                return None
            if self.spread_axis == 0:
                return self.spread(side, 0)
            return self.spread(side, 1 if self.spread_axis == block_axis else None)

        return Basis(*map(spread, basis, (1, 3, 1, 3)))

    def stack_on_a_device(self, stack: Array) -> int | None:
        """How many of a stack a device has; None if blocks may be cut, or nobody knows."""
        if (sharding := _arrays.explicit_sharding(stack)) is not None:
            return sharding.shard_shape(stack.shape)[0]
        if self.stack_sharding is None or self.spread_axis in (1, 3):
            return None
        return _part(stack.shape[0], self.shards) if self.spread_axis == 0 else stack.shape[0]

    def is_laid_out(self, matrices: Array) -> bool:
        """Whether a loop over tiles stays on each device."""
        return self.stack_on_a_device(matrices) is not None

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
        return self.change(None, basis, x)

    def change(self, old: Basis | None, new: Basis | None, x: Array) -> Array:
        """Turns numbers in one basis into another; None stands for the array's own axes."""
        return self.turned(old, new, self.matrices(x), x)

    def turned(
        self,
        old: Basis | None,
        new: Basis | None,
        matrices: Float[Array, "s i a j b"],
        like: Array,
    ) -> Array:
        """As `change`, of the `matrices` of an array."""
        old, new = (basis and self.spread_basis(basis) for basis in (old, new))
        return self.array(turn(old, new, matrices, self.is_laid_out(matrices)), like)

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
        return self.change(basis, None, z)

    def observe(
        self, basis: Basis, matrices: Float[Array, "s i a j b"], decay: Any
    ) -> tuple[Basis, Bool[Array, ""]]:
        """Averages the products of a gradient into the factors.

        Args:
          basis: the factors before.
          matrices: of the gradient.
          decay: β.

        Returns:
          The new factors, and whether the gradient's squares are finite; the old factors if not.
        """
        basis = self.spread_basis(basis)
        sums = products(basis, matrices, self.is_laid_out(matrices))
        # Each trace is the sum of the squares of the whole gradient.
        one = sums.left if sums.left is not None else sums.right
        assert one is not None
        finite = jnp.isfinite(jnp.trace(one, axis1=-2, axis2=-1).sum())

        def average(factor: Array | None, product: Array | None) -> Array | None:
            if factor is None or product is None:
                return None
            return jnp.where(finite, decay * factor + (1 - decay) * product, factor)

        left, right = average(basis.left, sums.left), average(basis.right, sums.right)
        return basis._replace(left=left, right=right), finite


def refreshed(views: Sequence[MatrixView], bases: Sequence[Basis]) -> tuple[Basis, ...]:
    """Takes one step of power iteration for each basis.

    Blocks of one size in stacks of one length share a QR decomposition.

    Args:
      views: how each parameter is read.
      bases: its factors and bases.

    Returns:
      The same factors with new bases. A block whose factor is zero, or whose new basis is not
      finite, keeps its basis.
    """
    bases = [view.spread_basis(basis) for view, basis in zip(views, bases, strict=True)]
    factors = jax.tree.leaves([(basis.left, basis.right) for basis in bases])
    own_views = [
        view
        for view, basis in zip(views, bases, strict=True)
        for factor in (basis.left, basis.right)
        if factor is not None
    ]
    old, treedef = jax.tree.flatten([(basis.left_basis, basis.right_basis) for basis in bases])
    groups: dict[Any, list[int]] = {}
    for index, (view, factor) in enumerate(zip(own_views, factors, strict=True)):
        stack, _, size, _ = factor.shape
        sharding = _arrays.explicit_sharding(factor)
        on_a_device = view.stack_on_a_device(factor)
        kind = stack, size, factor.dtype, sharding and sharding.spec, on_a_device
        groups.setdefault(kind, []).append(index)
    new = [*old]
    for (*_, on_a_device), members in groups.items():
        together = jnp.concatenate([factors[i] for i in members], axis=1)
        before = jnp.concatenate([old[i] for i in members], axis=1)
        blocks = together.shape[1]
        at_once = blocks if on_a_device is None else MATRICES_AT_ONCE // on_a_device
        moved = power_step(together, before, at_once)
        ends = itertools.accumulate(factors[i].shape[1] for i in members)
        for i, part in zip(members, jnp.split(moved, [*ends][:-1], axis=1), strict=True):
            new[i] = part
    return tuple(
        basis._replace(left_basis=left, right_basis=right)
        for basis, (left, right) in zip(bases, treedef.unflatten(new), strict=True)
    )


def _part(length: int, shards: int) -> int:
    """How much of an axis a device has; the last ones may have less."""
    return -(-length // shards)


def _tuple(axes: str | tuple[str, ...]) -> tuple[str, ...]:
    """The names of the mesh axes of one dimension."""
    return (axes,) if isinstance(axes, str) else axes
