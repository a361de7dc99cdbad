"""The leaves of a tree that have a basis: their turn, and what an inner state keeps of them."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from sophia_optax import _arrays, _spread_matrices, _trees
from sophia_optax._eigenbasis import Basis
from sophia_optax._matrix_view import MatrixView

MOMENTUM_NAMES = (
    *("mu", "trace", "ema", "m1", "m2", "exp_avg"),
    *("grad_acc", "acc_grads", "previous_gradient", "prev_updates"),
)
"""What Optax's states call a momentum or another sum of gradients, which turns with the basis."""

STILL_NAMES = ("nu", "nu_max", "exp_avg_sq", "sum_of_squares", "e_g", "e_x", "step_sizes")
"""What Optax's states call squares and sizes of coordinates, which stay when the basis turns."""


class Momentum(NamedTuple):
    """A momentum in an inner state: its place among the leaves, whose it is, its value."""

    leaf: int
    owner: int
    value: Array


class TurnedLeaves(NamedTuple):
    """The leaves of a tree that have a basis, and how to reach them in trees of its structure.

    Attributes:
      treedef: the structure of the tree, with a leaf for each absent node.
      indices: which of the leaves have a basis.
      paths: their paths.
      all_paths: those of all leaves.
      views: how they are read as matrices.
      names: of the momenta in an inner state; None stands for `MOMENTUM_NAMES`.
    """

    treedef: Any
    indices: tuple[int, ...]
    paths: tuple[str, ...]
    all_paths: frozenset[str]
    views: tuple[MatrixView, ...]
    names: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls,
        tree: PyTree[Any],
        views: list[MatrixView | None],
        names: tuple[str, ...] | None = None,
    ) -> "TurnedLeaves":
        """Finds the leaves that have a view; `views` has one for each leaf that is not absent."""
        flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_trees.is_absent)
        present = [(i, path) for i, (path, leaf) in enumerate(flat) if not _trees.is_absent(leaf)]
        chosen = [
            (index, jax.tree_util.keystr(path), view)
            for (index, path), view in zip(present, views, strict=True)
            if view is not None
        ]
        indices, paths, own = zip(*chosen, strict=True) if chosen else ((), (), ())
        all_paths = frozenset(jax.tree_util.keystr(path) for path, _ in flat)
        return cls(treedef, indices, paths, all_paths, own, names)

    def matrices(self, updates: PyTree[Any]) -> list[Array | None]:
        """Reads gradients as matrices, once for all that needs them; None without a gradient."""
        leaves = self.treedef.flatten_up_to(updates)
        own = [(view, leaves[i]) for i, view in zip(self.indices, self.views, strict=True)]
        return [None if _trees.is_absent(g) else view.matrices(g) for view, g in own]

    def observe(
        self, bases: tuple[Basis, ...] | Array, matrices: list[Array | None], decay: Any
    ) -> tuple[tuple[Basis, ...], list[Any]]:
        """Averages gradients into the factors.

        Args:
          bases: before.
          matrices: of the gradients.
          decay: β.

        Returns:
          The bases with their new factors; and for each whether the squares of its gradient are
          finite, True without a gradient.
        """
        own = [*self.own(bases)]
        finite: list[Any] = [True] * len(own)
        there = [number for number, m in enumerate(matrices) if m is not None]
        sums = _spread_matrices.products(
            [self.views[i] for i in there],
            [own[i] for i in there],
            [cast(Array, matrices[i]) for i in there],
        )
        for number, sides in zip(there, sums, strict=True):
            own[number], finite[number] = _average(own[number], sides, decay)
        return tuple(own), finite

    def turn_gradients(
        self,
        bases: tuple[Basis, ...],
        matrices: list[Array | None],
        finite: list[Any],
        updates: PyTree[Any],
    ) -> PyTree[Any]:
        """Turns gradients into their bases, with zeros for those whose squares are not finite."""
        leaves = self.treedef.flatten_up_to(updates)
        there = [(i, m) for i, m in enumerate(matrices) if m is not None]
        likes = [leaves[self.indices[i]] for i, _ in there]
        turned = self._change(there, None, bases, likes)
        for (number, _), z in zip(there, turned, strict=True):
            leaves[self.indices[number]] = jnp.where(finite[number], z, jnp.zeros((), z.dtype))
        return self.treedef.unflatten(leaves)

    def change(
        self, old: tuple[Basis, ...] | None, new: tuple[Basis, ...] | None, tree: PyTree[Any]
    ) -> PyTree[Any]:
        """Turns a tree in one basis into another; None stands for the parameters' own axes."""
        leaves = self.treedef.flatten_up_to(tree)
        there = [(n, i) for n, i in enumerate(self.indices) if not _trees.is_absent(leaves[i])]
        likes = [leaves[i] for _, i in there]
        stacks = [(n, self.views[n].matrices(leaves[i])) for n, i in there]
        for (_, i), x in zip(there, self._change(stacks, old, new, likes), strict=True):
            leaves[i] = x
        return self.treedef.unflatten(leaves)

    def change_momenta(
        self, momenta: list[Momentum], old: tuple[Basis, ...], new: tuple[Basis, ...]
    ) -> list[Array]:
        """Turns momenta from one basis into another."""
        likes = [momentum.value for momentum in momenta]
        stacks = [(own.owner, self.views[own.owner].matrices(own.value)) for own in momenta]
        turned = self._change(stacks, old, new, likes)
        return [x.astype(like.dtype) for x, like in zip(turned, likes, strict=True)]

    def _change(
        self,
        stacks: list[tuple[int, Array]],
        old: tuple[Basis, ...] | None,
        new: tuple[Basis, ...] | None,
        likes: list[Array],
    ) -> list[Array]:
        """Turns matrices with the bases of their owners, and reads them as arrays again."""
        owners, own = [owner for owner, _ in stacks], [x for _, x in stacks]
        views = [self.views[owner] for owner in owners]

        def of_owners(bases: tuple[Basis, ...] | None) -> list[Basis | None]:
            return [None if bases is None else bases[owner] for owner in owners]

        turned = _spread_matrices.turn(views, of_owners(old), of_owners(new), own)
        return [view.array(x, like) for view, x, like in zip(views, turned, likes, strict=True)]

    def own(self, bases: tuple[Basis, ...] | Array) -> tuple[Basis, ...]:
        """The bases of a state, where a zero stands for none.

        Args:
          bases: of the state.

        Returns:
          One for each of these leaves.

        Raises:
          ValueError: if they are not those of these leaves.
        """
        own = () if hasattr(bases, "shape") else cast(tuple[Basis, ...], tuple(bases))
        found = [tuple(None if side is None else jnp.shape(side) for side in one) for one in own]
        needed = [tuple(view.basis_shapes) for view in self.views]
        if found != needed:
            named = ", ".join(path or "(root)" for path in self.paths) or "none"
            raise ValueError(
                f"The state of in_eigenbasis has bases of the shapes {found}, where the parameters "
                f"that are turned ({named}) need {needed}. Pass update the params that init was "
                "called with, and leave max_size, block_size and dimension_numbers as they were; "
                "where any of them has changed, make a new state with init(params)."
            )
        return own

    def cast(
        self, updates: PyTree[Any], gradients: PyTree[Any], params: PyTree[Any] | None
    ) -> PyTree[Any]:
        """Rounds updates to the dtypes that gradients and params promote to, where turned."""
        grads = self.treedef.flatten_up_to(gradients)
        others = grads if params is None else self.treedef.flatten_up_to(params)
        leaves = self.treedef.flatten_up_to(updates)
        for index in self.indices:
            if not _trees.is_absent(leaves[index]):
                leaves[index] = leaves[index].astype(jnp.result_type(grads[index], others[index]))
        return self.treedef.unflatten(leaves)

    def momenta(self, inner_state: Any) -> list[Momentum]:
        """Finds the momenta of these leaves, by their names.

        Args:
          inner_state: the state of the inner transformation.

        Returns:
          The momenta.

        Raises:
          ValueError: if, without names given, an array like one of these leaves has a name that
            does not tell whether it is a momentum.
        """
        names = MOMENTUM_NAMES if self.names is None else self.names
        owners = {path: number for number, path in enumerate(self.paths)}
        found = []
        for position, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(inner_state)):
            parameter, name = self._parameter_and_name(path)
            owner = owners.get(parameter) if parameter is not None else None
            # Shapes too: below a parameter that is the whole tree there is every leaf.
            if owner is None or jnp.shape(leaf) != self.views[owner].shape:
                continue
            if name in names:
                found.append(Momentum(position, owner, leaf))
            elif self.names is None and name not in STILL_NAMES and _arrays.is_inexact(leaf):
                said = f"its name, {name!r}," if isinstance(name, str) else "its place"
                raise ValueError(
                    "The inner state has an array like a turned parameter at "
                    f"{_trees.name_of(path)}, and {said} does not say whether it is a momentum, "
                    "which turns when the basis does. Pass in_eigenbasis(inner, momenta=...), the "
                    "names of all fields that are averages or sums of gradients; () if none is."
                )
        return found

    def check_names(self, inner_state: Any) -> None:
        """Refuses names that no field of an inner state has.

        Args:
          inner_state: the state of the inner transformation.

        Raises:
          ValueError: if there is such a name.
        """
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(inner_state)]
        fields = {_name(key): None for path in paths for key in path}
        unknown = [name for name in self.names or () if name not in fields]
        if unknown and self.indices:
            named = ", ".join(repr(field) for field in fields if isinstance(field, str))
            raise ValueError(
                f"momenta names {unknown[0]!r}, which is no field of the inner state. Name fields "
                f"that are averages or sums of gradients; it has {named or 'no field with a name'}."
            )

    def _parameter_and_name(self, path: tuple[Any, ...]) -> tuple[str | None, Any]:
        """The parameter at the end of a path in an inner state, and the name before it."""
        # The longest one: the path of a parameter below "mu" may end with another one's.
        for depth in range(len(path) + 1):
            parameter = jax.tree_util.keystr(path[depth:])
            if parameter in self.all_paths:
                return parameter, _name(path[depth - 1]) if depth else None
        return None, None

    def with_momenta(self, inner_state: Any, values: list[Array]) -> Any:
        """Replaces the momenta of these leaves."""
        leaves, treedef = jax.tree.flatten(inner_state)
        for momentum, value in zip(self.momenta(inner_state), values, strict=True):
            leaves[momentum.leaf] = value
        return treedef.unflatten(leaves)

    def without_rounding(
        self, moved: PyTree[Any], inner_state: Any, turned_gradients: PyTree[Any]
    ) -> PyTree[Any]:
        """Takes no step along coordinates whose momentum is rounding.

        A gradient has no part in some of the axes when a batch has fewer examples than a matrix has
        rows. What is left there is the rounding of the products. Divided by the square root of its
        own square, or by its own curvature, it would be a step of full length in a random
        direction.

        Args:
          moved: the inner transformation's updates, in the turned coordinates.
          inner_state: its new state.
          turned_gradients: what stands for the momenta where the inner state has none.

        Returns:
          The updates, with zeros there.
        """
        above: dict[int, Array] = {}
        for _, owner, value in self.momenta(inner_state):
            own = self.views[owner].above_rounding(value)
            above[owner] = above[owner] | own if owner in above else own
        gradients = self.treedef.flatten_up_to(turned_gradients)
        leaves = self.treedef.flatten_up_to(moved)
        for number, index in enumerate(self.indices):
            if not _trees.is_absent(leaves[index]):
                if number not in above:
                    above[number] = self.views[number].above_rounding(gradients[index])
                zero = jnp.zeros((), leaves[index].dtype)
                leaves[index] = jnp.where(above[number], leaves[index], zero)
        return self.treedef.unflatten(leaves)


def _name(key: Any) -> Any:
    """The name in a key of a path; None in a sequence."""
    return getattr(key, "name", getattr(key, "key", None))


def names_of_momenta(momenta: Iterable[str] | None) -> tuple[str, ...] | None:
    """Checks the names of the momenta.

    Args:
      momenta: as passed to `in_eigenbasis`.

    Returns:
      The names; None where they are not given.

    Raises:
      TypeError: if they are not several strings.
    """
    if momenta is None:
        return None
    names = None if isinstance(momenta, str) or not isinstance(momenta, Iterable) else (*momenta,)
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"momenta is {momenta!r}. Pass the names of fields of the inner state, e.g. "
            'momenta=("mu",), or None.'
        )
    return names


def _average(basis: Basis, sums: Basis, decay: Any) -> tuple[Basis, Bool[Array, ""]]:
    """Averages the products of a gradient into the factors.

    Args:
      basis: the factors before.
      sums: the products.
      decay: β.

    Returns:
      The new factors, and whether the gradient's squares are finite; the old factors if not.
    """
    # Each trace is the sum of the squares of the whole gradient.
    one = jax.tree.leaves(sums)[0]
    finite = jnp.isfinite(jnp.trace(one, axis1=-2, axis2=-1).sum())

    def average(factor: Array | None, product: Array | None) -> Array | None:
        if factor is None or product is None:
            return None
        new = decay * factor + (1 - decay) * product
        return jnp.where(finite, new.astype(factor.dtype), factor)

    left, right = average(basis.left, sums.left), average(basis.right, sums.right)
    return basis._replace(left=left, right=right), finite


@functools.partial(jax.tree_util.register_dataclass, data_fields=["bases"], meta_fields=["leaves"])
@dataclass(frozen=True)
class EigenbasisCoordinates:
    """The `Coordinates` in which the inner transformation works.

    A pytree, so that the estimator may be compiled by itself.

    Attributes:
      leaves: what is turned, which is static.
      bases: the bases.
    """

    leaves: TurnedLeaves
    bases: tuple[Basis, ...]

    def turn(self, tree: PyTree[Any]) -> PyTree[Any]:
        """From the parameters' own axes into the eigenbasis."""
        return self.leaves.change(None, self.bases, tree)

    def back(self, tree: PyTree[Any]) -> PyTree[Any]:
        """From the eigenbasis into the parameters' own axes."""
        return self.leaves.change(self.bases, None, tree)
