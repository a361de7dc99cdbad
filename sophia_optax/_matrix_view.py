"""How arrays are read as stacks of matrices in blocks, and where these are turned.

Under Explicit axes the sharding is part of an array's type, and matrices are spread as the params
are. Under Auto axes they are where a `stack_sharding` puts them. Either way a stack is spread over
the devices, each of which turns its own matrices, so that nothing is communicated but the arrays.
Under Auto axes without one the compiler decides, and gathers and adds far more.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from sophia_optax import _arrays, _manual_axes
from sophia_optax._eigenbasis import Basis


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
      explicit: the sharding of the stack under Explicit axes, over the mesh axes of the parameter
        where it divides. It holds for all that is turned with the parameter: gradients and momenta
        may lie otherwise.
    """

    permutation: tuple[int, ...]
    stack_axes: int
    shape: tuple[int, ...]
    view: tuple[int, int, int, int, int]
    turns_left: bool
    turns_right: bool
    stack_sharding: NamedSharding | None = None
    explicit: NamedSharding | None = None

    def matrices(self, x: Array) -> Float[Array, "s i a j b"]:
        """Views an array as matrices in blocks, in float32 at least.

        Args:
          x: the array.

        Returns:
          The matrices, with zeros at the end of an axis that `stack_sharding` does not divide.
        """
        # Under Explicit axes, sharded over the stack where that divides, so that nothing else is
        # communicated until `array`; otherwise every device has all of them.
        wide = self.spread_array(x.astype(_arrays.at_least_float32(x.dtype)))
        whole = _arrays.reshard(wide, PartitionSpec()).transpose(self.permutation)
        axis, view = self.spread_axis, self.view
        if axis is not None:
            view = (*view[:axis], -1, *view[axis + 1 :])
        return self.spread(self.sharded(whole.reshape(view)), self.spread_axis)

    def array(self, matrices: Float[Array, "s i a j b"], like: Array) -> Array:
        """Undoes `matrices`, but for the dtype, in the sharding of the array."""
        cut, axis = self.spread_axis, self.spread_axis_of_array
        whole = _arrays.reshard(self.spread(matrices, cut), PartitionSpec())
        if cut is not None and axis is None:
            whole = jax.lax.slice_in_dim(whole, 0, self.view[cut], axis=cut)
        transposed = whole.reshape([-1 if n == axis else self.shape[n] for n in self.permutation])
        inverse = sorted(range(len(self.permutation)), key=self.permutation.__getitem__)
        sharding = _arrays.explicit_sharding(like)
        spec = PartitionSpec() if sharding is None else sharding.spec
        array = _arrays.reshard(transposed.transpose(inverse), spec)
        spread = self.spread_array(array)
        if axis is None:
            return spread
        return jax.lax.slice_in_dim(spread, 0, self.shape[axis], axis=axis)

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
            slices = -(-length // self.shards) * (stack // length)
            return first if slices == -(-stack // self.shards) else None
        if self.spread_axis is not None and sides == 2:
            return self.permutation[-2 if self.spread_axis in (1, 2) else -1]
        return None

    @property
    def shards(self) -> int:
        """In how many parts `stack_sharding` cuts an axis; 1 without one."""
        if self.stack_sharding is None:
            return 1
        names = _manual_axes.names(self.stack_sharding.spec[0])
        return math.prod(self.stack_sharding.mesh.shape[name] for name in names)

    @property
    def mesh(self) -> Any:
        """The mesh over which matrices, or sides, are spread; None where only XLA knows."""
        sharding = self.explicit or self.stack_sharding
        return None if sharding is None else sharding.mesh

    def spec(self, axis: int | None) -> PartitionSpec:
        """How matrices, or factors and bases, are spread over that mesh.

        Args:
          axis: which of the axes `stack_sharding` cuts.

        Returns:
          The spec.
        """
        if self.explicit is not None:
            return self.explicit.spec
        if axis is None or self.stack_sharding is None:
            return PartitionSpec()
        return PartitionSpec(*[None] * axis, *self.stack_sharding.spec)

    def spread(self, x: Array, axis: int | None) -> Array:
        """Cuts an axis of an array as `stack_sharding` says, under Auto axes; None cuts none."""
        if self.stack_sharding is None or self.explicit is not None:
            return x
        if axis is not None:
            x = _arrays.pad_to_multiple(x, axis, self.shards)
        sharding = NamedSharding(self.stack_sharding.mesh, self.spec(axis))
        return jax.lax.with_sharding_constraint(x, sharding)

    def spread_array(self, x: Array) -> Array:
        """Cuts an array where that leaves each device its matrices, or its blocks of one."""
        axis = self.spread_axis_of_array
        if axis is not None and self.stack_sharding is not None and self.spread_axis in (1, 3):
            x = _arrays.pad_to_multiple(x, axis, self.shards * self.view[self.spread_axis + 1])
        return self.spread(x, axis)

    @property
    def spread_axes_of_basis(self) -> tuple[int | None, int | None, int | None, int | None]:
        """The axis of each side of a `Basis` that is cut with `spread_axis`."""
        if self.spread_axis == 0:
            return 0, 0, 0, 0
        left, right = (1 if self.spread_axis == axis else None for axis in (1, 3))
        return left, right, left, right

    def spread_basis(self, basis: Basis) -> Basis:
        """Cuts factors and bases over the devices as the matrices are cut."""
        return _of_sides(self.spread, basis, self.spread_axes_of_basis)

    def basis_specs(self, basis: Basis) -> Any:
        """The `spec` of each side."""
        return _of_sides(lambda _, axis: self.spec(axis), basis, self.spread_axes_of_basis)

    def whole_basis(self, basis: Basis) -> Basis:
        """Undoes the padding of `spread_basis`."""
        stack, left_blocks, _, right_blocks, _ = self.view
        blocks = left_blocks, right_blocks, left_blocks, right_blocks
        return _of_sides(lambda side, n: side[:stack, :n], basis, blocks)

    def sharded(self, stack: Array) -> Array:
        """Shards a stack as the parameter is, under Explicit axes."""
        return stack if self.explicit is None else jax.sharding.reshard(stack, self.explicit)

    @property
    def basis_shapes(self) -> Any:
        """The shapes of factors and bases: a `Basis` of tuples."""
        stack, left_blocks, left, right_blocks, right = self.view
        rows = (stack, left_blocks, left, left) if self.turns_left else None
        columns = (stack, right_blocks, right, right) if self.turns_right else None
        return Basis(*cast(Any, (rows, columns, rows, columns)))

    def init(self, like: Any) -> Basis:
        """Zero factors, and the identity as bases."""
        dtype = _arrays.at_least_float32(_arrays.dtype_to_average(like))

        def factor(shape: tuple[int, ...]) -> Array:
            return _manual_axes.vary_like(self.sharded(jnp.zeros(shape, dtype)), like)

        def identity(shape: tuple[int, ...]) -> Array:
            eye = jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)
            return _manual_axes.vary_like(self.sharded(jnp.array(eye)), like)

        shapes = self.basis_shapes
        makers = Basis(*cast(Any, (factor, factor, identity, identity)))
        return _of_sides(lambda shape, make: make(shape), shapes, makers)

    def above_rounding(self, z: Array) -> Array:
        """Whether turned numbers are more than the rounding of the products that turned them."""
        # In the array's own shape and sharding: no more than the norms is communicated.
        wide = z.astype(_arrays.at_least_float32(z.dtype))
        axes = self.permutation[self.stack_axes :]
        norm = jnp.sqrt(jnp.sum(jnp.square(wide), axis=axes, keepdims=True))
        rounding = 16 * jnp.finfo(wide.dtype).eps * jnp.where(jnp.isfinite(norm), norm, 0.0)
        return jnp.abs(wide) >= rounding


def _of_sides(function: Callable[[Array, Any], Any], basis: Basis, values: Iterable[Any]) -> Basis:
    """Applies a function to the sides that there are, each with a value."""
    sides = zip(basis, values, strict=True)
    return Basis(*(None if side is None else function(side, value) for side, value in sides))
