"""What `jax.tree` and `optax.tree` lack: the leaves that can be differentiated, or are owned."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from sophia_optax import _manual_axes
from sophia_optax._arrays import is_complex, is_inexact
from sophia_optax._types import Coordinates


class Differentiable(NamedTuple):
    """The floating point leaves of a tree, and the way to the tree and from one like it.

    Attributes:
      leaves: the leaves.
      combine: the tree with other leaves instead, and the rest as it was.
      combine_with_zeros: the tree with other leaves instead, and float32 zeros everywhere else.
      select: the corresponding leaves of a tree of the same structure.
    """

    leaves: list[Array]
    combine: Callable[[list[Array]], PyTree[Any]]
    combine_with_zeros: Callable[[list[Array]], PyTree[Any]]
    select: Callable[[PyTree[Any]], list[Array]]


def differentiable(params: PyTree[Any]) -> Differentiable:
    """Takes the floating point leaves out of a tree.

    Args:
      params: a pytree with leaves of any kind.

    Returns:
      The leaves, and the functions that go with them.

    Raises:
      TypeError: if a leaf is complex.
    """
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    for path, leaf in paths_and_leaves:
        if is_complex(leaf):
            raise TypeError(
                f"The parameter at {name_of(path)} is {jnp.result_type(leaf)}, and the diagonal of "
                "a Hessian is defined for real parameters only. Run the optimizer inside of "
                "optax.contrib.split_real_and_imaginary, and make the estimator of the pairs of "
                "real arrays that it passes on."
            )
    leaves = [leaf for _, leaf in paths_and_leaves]
    places = [i for i, leaf in enumerate(leaves) if is_inexact(leaf)]

    def combine(chosen: list[Array]) -> PyTree[Any]:
        new = list(leaves)
        for place, leaf in zip(places, chosen, strict=True):
            new[place] = leaf
        return treedef.unflatten(new)

    def combine_with_zeros(chosen: list[Array]) -> PyTree[Any]:
        given = dict(zip(places, chosen, strict=True))
        return treedef.unflatten(
            given[i] if i in given else jnp.zeros(jnp.shape(leaf), jnp.float32)
            for i, leaf in enumerate(leaves)
        )

    def select(tree: PyTree[Any]) -> list[Array]:
        own = treedef.flatten_up_to(tree)
        return [own[i] for i in places]

    return Differentiable(
        [jnp.asarray(leaves[i]) for i in places], combine, combine_with_zeros, select
    )


def turned(
    theta: Differentiable, coordinates: Coordinates | None, leaves: list[Array]
) -> list[Array]:
    """Takes leaves into other coordinates; None stands for the parameters' own axes."""
    if coordinates is None:
        return leaves
    return theta.select(coordinates.turn(theta.combine(leaves)))


def turned_back(
    theta: Differentiable, coordinates: Coordinates | None, leaves: list[Array]
) -> list[Array]:
    """Takes leaves out of other coordinates, in the dtypes that they have there."""
    if coordinates is None:
        return leaves
    own_axes = theta.select(coordinates.back(theta.combine(leaves)))
    return [own.astype(leaf.dtype) for own, leaf in zip(own_axes, leaves, strict=True)]


@dataclasses.dataclass(frozen=True)
class OwnedLeaves:
    """The leaves that a transform moves: neither masked out nor None, and floating point.

    `optax.masked` and `optax.partition` hand a transform trees in which a `MaskedNode` stands for
    what it does not own, a leaf or a whole subtree, and gradients can be None.

    Attributes:
      paths: where the leaves of the tree are, absent and integer ones included.
      treedef: the structure of the tree, with a leaf for each absent node.
      indices: which of the leaves are owned.
      shapes: the shapes of those.
      axes: the manual mesh axes over which each of those varies.
    """

    paths: tuple[Any, ...]
    treedef: Any
    indices: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    axes: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, tree: PyTree[Any]) -> "OwnedLeaves":
        """Finds the owned leaves of a tree of gradients.

        Args:
          tree: the gradients.

        Returns:
          Where they are.

        Raises:
          TypeError: if a gradient is complex.
        """
        flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_absent)
        for path, leaf in flat:
            if not is_absent(leaf) and is_complex(leaf):
                raise TypeError(
                    f"The gradient at {name_of(path)} is {jnp.result_type(leaf)}, and the diagonal "
                    "of a Hessian is defined for real parameters only. Split them into real and "
                    "imaginary parts with optax.contrib.split_real_and_imaginary."
                )
        leaves = [leaf for _, leaf in flat]
        indices = [i for i, x in enumerate(leaves) if not is_absent(x) and is_inexact(x)]
        shapes = tuple(jnp.shape(leaves[i]) for i in indices)
        axes = tuple(_manual_axes.varying(leaves[i]) for i in indices)
        return cls(tuple(path for path, _ in flat), treedef, tuple(indices), shapes, axes)

    @property
    def size(self) -> int:
        """How many coordinates there are."""
        return sum(math.prod(shape) for shape in self.shapes)

    def select(self, tree: PyTree[Any]) -> list[Any]:
        """Returns the owned leaves of a tree that may hold more than is owned."""
        leaves = self.treedef.flatten_up_to(tree)
        return [leaves[index] for index in self.indices]

    def select_state(self, average: PyTree[Any]) -> list[Array]:
        """Returns the owned leaves of an average in the state.

        Args:
          average: of the gradients, or of what has their shapes.

        Returns:
          A leaf for each owned one, of its shape.

        Raises:
          ValueError: if the structure or a shape is not that of the gradients.
        """
        remedy = (
            "Pass gradients of the params that init was called with; where the params have changed "
            "since, make a new state with init(params)."
        )
        try:
            leaves = self.select(average)
        except ValueError as error:
            raise ValueError(
                "The optimizer's state does not match the gradients: it has "
                f"{self._where(average)}. {remedy}"
            ) from error
        for index, shape, leaf in zip(self.indices, self.shapes, leaves, strict=True):
            name = name_of(self.paths[index])
            if not jax.tree_util.all_leaves([leaf]):
                raise ValueError(
                    "The optimizer's state does not match the gradients: it has no leaf at "
                    f"{name}, where the gradients have one. {remedy}"
                )
            if jnp.shape(leaf) != shape:
                raise ValueError(
                    f"The gradient at {name} has shape {shape}, where the optimizer's state has "
                    f"{jnp.shape(leaf)}. {remedy}"
                )
        return leaves

    def replace(self, tree: PyTree[Any], values: list[Array]) -> PyTree[Any]:
        """Replaces the owned leaves of a tree."""
        leaves = self.treedef.flatten_up_to(tree)
        for index, value in zip(self.indices, values, strict=True):
            leaves[index] = value
        return self.treedef.unflatten(leaves)

    def select_estimate(self, estimate: PyTree[Any]) -> list[Array]:
        """Returns the owned leaves of an estimate for the whole params.

        Args:
          estimate: what a `HessianFn` returned.

        Returns:
          A leaf for each owned one, of its shape.

        Raises:
          TypeError: if a leaf is not real.
          ValueError: if the structure or a shape differs, or it varies over a manual mesh axis
            that the gradient does not vary over.
        """
        try:
            leaves = self.select(estimate)
        except ValueError as error:
            raise ValueError(self._difference(estimate)) from error
        if not all(map(jax.tree_util.all_leaves, ([leaf] for leaf in leaves))):
            raise ValueError(self._difference(estimate))
        for index, shape, axes, leaf in zip(
            self.indices, self.shapes, self.axes, leaves, strict=True
        ):
            name = name_of(self.paths[index])
            dtype = jnp.result_type(leaf)
            if jnp.issubdtype(dtype, jnp.complexfloating) or not jnp.issubdtype(dtype, jnp.number):
                raise TypeError(
                    f"The estimate of hessian_fn is {dtype} at {name}. Let it return real numbers."
                )
            if jnp.shape(leaf) != shape:
                raise ValueError(
                    f"The estimate of hessian_fn has shape {jnp.shape(leaf)} at {name}, where the "
                    f"gradient has {shape}. Let it return a pytree with the shapes of the params."
                )
            if unreduced := tuple(a for a in _manual_axes.varying(leaf) if a not in axes):
                raise ValueError(
                    f"The estimate of hessian_fn at {name} varies over the mesh axes {unreduced}, "
                    "and the gradient does not. Make the estimator of the params that the gradient "
                    f"is taken in, or return jax.lax.pmean(estimate, {unreduced})."
                )
        return [jnp.asarray(leaf) for leaf in leaves]

    def _difference(self, estimate: PyTree[Any]) -> str:
        """Says where the structure of an estimate is not that of the gradients."""
        return (
            "The estimate of hessian_fn does not match the gradients: it has "
            f"{self._where(estimate)}. Let it return a pytree like the whole params; and leave "
            "optax.flatten out, which hides their structure from the optimizer that it wraps."
        )

    def _where(self, tree: PyTree[Any]) -> str:
        """Says what a tree has where its structure is not that of the gradients."""
        found = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        missing = [self.paths[index] for index in self.indices if self.paths[index] not in found]
        extra = [path for path in found if not any(path[: len(p)] == p for p in self.paths)]
        if missing:
            return f"no leaf at {name_of(missing[0])}, where the gradients have one"
        if extra:
            return f"a leaf at {name_of(extra[0])}, where they have none"
        return f"other containers, {jax.tree.structure(tree)}, where they have {self.treedef}"


def is_absent(node: Any) -> bool:
    """Whether a node stands for a leaf that is not there: None, or masked out."""
    return node is None or isinstance(node, optax.MaskedNode)


def name_of(path: tuple[Any, ...]) -> str:
    """A path in a pytree as it is written in code; the root is `(root)`."""
    return jax.tree_util.keystr(path) or "(root)"


def enumerated(tree: PyTree[Any]) -> PyTree[int]:
    """A tree of the numbers of its leaves, in their order."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(range(len(leaves)))


def is_masked(tree: PyTree[Any]) -> bool:
    """Whether `optax.masked` or `optax.partition` has taken something out of a tree."""

    def is_hole(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return any(map(is_hole, jax.tree.leaves(tree, is_leaf=is_hole)))


def cast_updates(
    updates: PyTree[Any], grads: PyTree[Any], params: PyTree[Any] | None
) -> PyTree[Any]:
    """Gives updates their dtypes, and zeros where the gradients are not floating point.

    Args:
      updates: a pytree like the gradients.
      grads: the gradients. Those of integers with respect to which `jax.grad(..., allow_int=True)`
        differentiated are float0, to which nothing can be added.
      params: the params, or None.

    Returns:
      The updates, each in the dtype that its gradient and its parameter promote to; so bfloat16
      gradients do not round the update of a float32 parameter. Zeros are of the integer's dtype, or
      int8 for float0.
    """

    def cast(update: Any, grad: Any, param: Any = None) -> Any:
        if is_absent(grad):
            return grad
        if is_inexact(grad):
            of_param = () if param is None or not is_inexact(param) else (param,)
            return update.astype(jnp.result_type(grad, *of_param))
        dtype = grad.dtype if hasattr(grad, "dtype") else jnp.result_type(grad)
        dtype = jnp.int8 if dtype == jax.dtypes.float0 else dtype
        return jnp.zeros(jnp.shape(grad), dtype)

    trees = (updates, grads) if params is None else (updates, grads, params)
    return jax.tree.map(cast, *trees, is_leaf=is_absent)
