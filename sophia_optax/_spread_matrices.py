"""Turns, products and bases of the matrices of many parameters, on the devices that have them.

Where it is known how the matrices are spread, the work is done under `jax.shard_map`. Each device
takes its own matrices, and nothing is communicated but sums over the parts of a single matrix.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from sophia_optax import _manual_axes, _tiles
from sophia_optax._eigenbasis import Basis
from sophia_optax._matrix_view import MatrixView


def turn(
    views: Sequence[MatrixView],
    olds: Sequence[Basis | None],
    news: Sequence[Basis | None],
    stacks: Sequence[Float[Array, "_s _i _a _j _b"]],
) -> list[Array]:
    """Takes the matrices of parameters out of one basis and into another.

    Args:
      views: how each parameter is read.
      olds: the bases that the matrices are in; None stands for the parameter's own axes.
      news: the bases to turn them into; None stands for the parameter's own axes.
      stacks: the matrices of each parameter.

    Returns:
      The turned matrices.
    """
    olds, news = _spread(views, olds), _spread(views, news)
    specs = _stack_specs(views)

    def change(_: list[int], in_loops: bool, olds: Any, news: Any, stacks: Any) -> list[Array]:
        return _tiles.turn(olds, news, stacks, in_loops)

    return _on_each_device(
        change,
        _meshes(views),
        (olds, news, stacks),
        (_basis_specs(views, olds), _basis_specs(views, news), specs),
        specs,
    )


def products(
    views: Sequence[MatrixView],
    bases: Sequence[Basis],
    stacks: Sequence[Float[Array, "_s _i _a _j _b"]],
) -> list[Basis]:
    """X xᵀ and xᵀ x of each parameter, instead of the factors that there are, and no bases.

    Args:
      views: how each parameter is read.
      bases: of each parameter.
      stacks: the matrices of each parameter.

    Returns:
      The products.
    """
    factors = [Basis(basis.left, basis.right, None, None) for basis in bases]
    factors = _spread(views, factors)
    specs = _stack_specs(views)
    own_specs = _basis_specs(views, factors)

    def sums(members: list[int], in_loops: bool, factors: Any, stacks: Any) -> list[Basis]:
        parts = _tiles.products(factors, stacks, in_loops)
        if not in_loops:
            return parts

        def total(number: int, sums: Basis) -> Basis:
            def over_the_rest(side: Array, spec: PartitionSpec) -> Array:
                return _manual_axes.total(side, sorted(_axes(specs[number]) - _axes(spec)))

            return jax.tree.map(over_the_rest, sums, own_specs[number])

        return [total(i, sums) for i, sums in zip(members, parts, strict=True)]

    padded = _on_each_device(sums, _meshes(views), (factors, stacks), (own_specs, specs), own_specs)
    return [view.whole_basis(own) for view, own in zip(views, padded, strict=True)]


def refresh(views: Sequence[MatrixView], bases: Sequence[Basis]) -> tuple[Basis, ...]:
    """Takes one step of power iteration for each basis.

    Args:
      views: how each parameter is read.
      bases: its factors and bases.

    Returns:
      The same factors with new bases. A block whose factor is zero, or whose new basis is not
      finite, keeps its basis.
    """

    def step(_: list[int], in_loops: bool, bases: Any) -> list[Basis]:
        factors = jax.tree.leaves([(basis.left, basis.right) for basis in bases])
        before = [(basis.left_basis, basis.right_basis) for basis in bases]
        old, treedef = jax.tree.flatten(before)
        new = treedef.unflatten(_tiles.power_steps(factors, old, in_loops))
        return [Basis(None, None, *sides) for sides in new]

    spread = _spread(views, bases)
    specs = _basis_specs(views, spread)
    padded = _on_each_device(
        step,
        _meshes(views),
        (spread,),
        (specs,),
        [spec._replace(left=None, right=None) for spec in specs],
    )
    new = [view.whole_basis(own) for view, own in zip(views, padded, strict=True)]
    return tuple(
        own._replace(left=basis.left, right=basis.right)
        for own, basis in zip(new, bases, strict=True)
    )


def _on_each_device(
    function: Callable[..., list[Any]],
    meshes: Sequence[Any],
    operands: tuple[Sequence[Any], ...],
    in_specs: tuple[Sequence[Any], ...],
    out_specs: Sequence[Any],
) -> list[Any]:
    """Calls a function on what each device has of some parameters.

    Args:
      function: takes the numbers of parameters, whether it is called for each device, and the
        operands of these parameters; gives a result for each.
      meshes: over which the operands of each parameter are spread; those without one are passed
        whole, by themselves.
      operands: each has one for each parameter.
      in_specs: of the operands.
      out_specs: of the result.

    Returns:
      The results.
    """
    results: list[Any] = [None] * len(meshes)
    for mesh in dict.fromkeys(meshes):
        members = [i for i, own in enumerate(meshes) if own == mesh]

        def take(values: Sequence[Any], members: list[int] = members) -> list[Any]:
            return [values[i] for i in members]

        call = functools.partial(function, members, mesh is not None)
        if mesh is not None:
            # Whether a result varies is known here: it does where its spec says so.
            call = jax.shard_map(
                call,
                mesh=mesh,
                axis_names={
                    name
                    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
                    if kind != AxisType.Manual
                },
                in_specs=tuple(map(take, in_specs)),
                out_specs=take(out_specs),
                check_vma=False,
            )
        for i, result in zip(members, call(*map(take, operands)), strict=True):
            own = [values[i] for values in operands]
            # Over other axes, which are manual already, it does where an operand does.
            results[i] = jax.tree.map(lambda x, own=own: _manual_axes.vary_like(x, own), result)
    return results


def _meshes(views: Sequence[MatrixView]) -> list[Any]:
    return [view.mesh for view in views]


def _stack_specs(views: Sequence[MatrixView]) -> list[Any]:
    return [view.spec(view.spread_axis) for view in views]


def _spread(views: Sequence[MatrixView], bases: Sequence[Any]) -> list[Any]:
    return [basis and view.spread_basis(basis) for view, basis in zip(views, bases, strict=True)]


def _basis_specs(views: Sequence[MatrixView], bases: Sequence[Any]) -> list[Any]:
    return [basis and view.basis_specs(basis) for view, basis in zip(views, bases, strict=True)]


def _axes(spec: PartitionSpec) -> set[str]:
    """The mesh axes that a spec names."""
    return {name for names in spec for name in _manual_axes.names(names)}
