"""Runs a coordinate-wise transformation in the Kronecker eigenbasis of each matrix.

This is not in the paper of Sophia. With `scale_by_sophia(nesterov=True)` inside, a matrix W takes

    L <- β L + (1-β) G Gᵀ        R <- β R + (1-β) Gᵀ G        with the current gradient, first
    Q_L <- orth(L Q_L)           Q_R <- orth(R Q_R)           every f-th step, and M turns along
    M <- b1 M + (1-b1) G         M̃ = b1 M + (1-b1) G
    Z = Q_Lᵀ M̃ Q_R
    h <- b2 h + (1-b2) ĥ         every k-th step; ĥ estimates the diagonal in the turned coordinates
    W <- W - η (Q_L clip(Z / max(γ |h|, ε), ±ρ) Q_Rᵀ + λ W)

and with `optax.scale_by_adam` inside it is SOAP (Vyas et al. 2024, arXiv 2409.11321). Differences
from the authors' SOAP:

1. The first step moves: the basis is refreshed from the first gradient before that is used, where
   SOAP skips the first update. The first basis is the identity, without an eigendecomposition.
2. The factors see the current gradient before the basis is refreshed and the gradient turned; SOAP
   turns with the basis of the step before.
3. The momentum is kept in the turned coordinates, and turned when the basis turns: the same numbers
   as a momentum in the parameter's own axes. What else the inner state averages (h, or Adam's v)
   stays as it is, as in SOAP.
4. The axes are not sorted by their eigenvalues: a power iteration with QR keeps their order.
5. Sides can be cut into blocks. Arrays of more than two axes are stacks of matrices, where SOAP has
   a factor for each axis.
6. A gradient whose squares are not finite counts as zero for that step, and is counted.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from sophia_optax import _arrays, _checks, _manual_axes, _spread_matrices, _trees
from sophia_optax._eigenbasis import Basis
from sophia_optax._matrix_axes import DimensionNumbers, matrix_views
from sophia_optax._matrix_view import MatrixView
from sophia_optax._turned_leaves import EigenbasisCoordinates, TurnedLeaves, names_of_momenta
from sophia_optax._types import Coordinates, HessianFn, LossFn, Params, Scalar

_SCHEDULED = (
    'optax.inject_hyperparams(in_eigenbasis, static_args=("max_size", "block_size"))'
    "(inner, {name}=schedule)"
)


class InEigenbasisState(NamedTuple):
    """The state of `in_eigenbasis`: arrays alone.

    Attributes:
      count: how many updates there have been, `i32[]`.
      rejected: in how many of them a gradient's squares were not finite, `i32[]`.
      bases: factors and bases of each parameter that is turned, in the order of the leaves; a zero
        where there is none.
      inner: the state of the inner transformation; its averages are in the turned coordinates.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    rejected: Int[Array, ""]
    bases: PyTree[Any]
    inner: PyTree[Any]


def in_eigenbasis(
    inner: optax.GradientTransformation,
    *,
    basis_interval: Scalar = 10,
    decay: Scalar = 0.9,
    max_size: int = 8192,
    block_size: int | None = None,
    dimension_numbers: DimensionNumbers | None = None,
    stack_sharding: NamedSharding | None = None,
    momenta: Iterable[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs a coordinate-wise transformation in the Kronecker eigenbasis of each matrix.

    On a CPU, set the environment variable OPENBLAS_NUM_THREADS to 1 before JAX calls LAPACK: with
    more threads a refresh of the bases can take several times as long, see `docs/gotchas.md`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sophia_optax
      >>> target = jax.random.normal(jax.random.key(0), (4, 3))
      >>> x = jax.random.normal(jax.random.key(1), (16, 4)) * jnp.array([10.0, 1.0, 1.0, 0.1])
      >>> loss_fn = lambda w: jnp.mean((x @ (w - target)) ** 2)
      >>> soap = optax.chain(
      ...     sophia_optax.in_eigenbasis(optax.scale_by_adam(0.9, 0.95, nesterov=True)),
      ...     optax.scale_by_learning_rate(0.1),
      ... )
      >>> @jax.jit
      ... def train_step(w, state):
      ...     loss, grads = jax.value_and_grad(loss_fn)(w)
      ...     updates, state = soap.update(grads, state, w)
      ...     return optax.apply_updates(w, updates), state, loss
      >>> w = jnp.zeros((4, 3))
      >>> state = soap.init(w)
      >>> for step in range(61):
      ...     w, state, loss = train_step(w, state)
      ...     if step % 20 == 0:
      ...         print(f"{loss:.1f}")
      359.3
      25.2
      3.2
      0.0

    Args:
      inner: a transformation whose update of a coordinate depends on that coordinate's gradients
        alone: `scale_by_sophia`, `optax.scale_by_adam`, `optax.scale_by_lion`, .... It sees
        gradients and params in the turned coordinates, and `obj_fn` as a function of these.
      basis_interval: f, the bases are refreshed every f-th step, the first included. Default: as
        often as Sophia's curvature. The best points of `benchmarks/lm_race.py` have 1, which takes
        more time a step.
      decay: β, of the averages of G Gᵀ and Gᵀ G, in [0, 1). Default: ours, not tuned.
      max_size: the longest side that has a basis; longer ones stay in their own axes.
      block_size: cuts each side into equal blocks with a basis each, of the side's largest divisor
        up to this, which is 2 at least. A side whose largest divisor is 1, or below a quarter of
        this, is not cut. None cuts no side: L, R and their bases then take 2m² + 2n² numbers for a
        parameter of m x n.
      dimension_numbers: which axes make up the matrices, see `MatrixAxes`. None takes the last two
        axes of each parameter that has at least two, and stacks the others, as in layers under
        `jax.lax.scan` and in convolutions. Give attention kernels of shape
        `[features, heads, head size]` explicitly.
      stack_sharding: where the matrices are turned under Auto axes, for params that are sharded:
        `NamedSharding(mesh, PartitionSpec("fsdp"))` gives each device along the mesh axis `fsdp`
        its part of each stack, which need not divide. Gradients, momenta and steps are then
        exchanged by all-to-alls, and no product or decomposition is split. A single matrix is cut
        along the side that is not turned, or along its blocks. None leaves it to the compiler,
        which gathers and adds several times as many bytes. Under Explicit axes the matrices
        follow the params.
      momenta: the fields of the inner state that are averages or sums of gradients. They turn when
        a basis changes, and the other ones, averages of squares, stay. None knows those of Optax's
        states whose names say what they are: `mu`, `trace`, `ema`, `m1`, `m2`, `exp_avg`, and what
        `optax.MultiSteps`, `apply_every`, `scale_by_optimistic_gradient` and `scale_by_rprop` keep.
        Any other field with arrays like turned parameters, but for the squares of Optax's states,
        is then an error. For `optax.scale_by_adan` pass `momenta=("m", "v", "g")`.

    Returns:
      A transformation whose `update` takes what the inner one takes, and `refresh_basis`. None
      decides by `lax.cond`, True or False fixes the branch when the step is traced. `hessian_fn`
      must be able to estimate in other coordinates, as `hutchinson` and `gauss_newton_bartlett`
      are (see `HessianFn`). Parameters that are not turned (vectors, scalars, those whose sides
      are all longer than `max_size`) take the inner transformation's step as it is.

    Raises:
      TypeError: if an argument is of the wrong kind.
      ValueError: if a number is out of its range, or dimension numbers do not fit the params; from
        `init` and `update`, if the names of the inner state do not say what is a momentum, or it
        has no field that `momenta` names.
    """
    _checks.check_interval("basis_interval", basis_interval, _SCHEDULED)
    _checks.check_number("decay", decay, 0, 1, "[0, 1)", _SCHEDULED)
    beta = _arrays.hyperparameter(decay)
    longest = _checks.static_count("max_size", max_size, least=0)
    largest_block = (
        None if block_size is None else _checks.static_count("block_size", block_size, 2)
    )
    _check_stack_sharding(stack_sharding)
    names = names_of_momenta(momenta)
    inner = optax.with_extra_args_support(inner)

    def views_of(params: Params) -> list[MatrixView | None]:
        stacks = _on_mesh_at_hand(stack_sharding)
        return matrix_views(params, dimension_numbers, longest, largest_block, stacks)

    def init(params: Params) -> InEigenbasisState:
        views, inner_state = views_of(params), inner.init(params)
        leaves = TurnedLeaves.of(params, views, names)
        leaves.check_names(inner_state)
        leaves.momenta(inner_state)  # raises where it is unknown what is one
        turned = [
            view.init(leaf)
            for view, leaf in zip(views, jax.tree.leaves(params), strict=True)
            if view is not None
        ]
        return InEigenbasisState(
            count=jnp.zeros((), jnp.int32),
            rejected=jnp.zeros((), jnp.int32),
            # One leaf and not (): so optax.tree.map_params, whose placeholder has no leaves, finds
            # something that is not a parameter here.
            bases=tuple(turned) or jnp.zeros((), jnp.float32),
            inner=inner_state,
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: Params | None = None,
        *,
        hessian_fn: HessianFn | None = None,
        obj_fn: LossFn | None = None,
        refresh_basis: bool | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, InEigenbasisState]:
        state = cast(InEigenbasisState, state)
        _check_refresh_basis(refresh_basis)
        like = updates if params is None else params
        turned = TurnedLeaves.of(like, views_of(like), names)
        matrices = turned.matrices(updates)
        bases, finite = turned.observe(state.bases, matrices, beta)
        inner_state = state.inner

        def refreshed() -> tuple[tuple[Basis, ...], list[Array]]:
            new = _spread_matrices.refresh(turned.views, bases)
            return new, turned.change_momenta(turned.momenta(inner_state), bases, new)

        def kept() -> tuple[tuple[Basis, ...], list[Array]]:
            return bases, [leaf.value for leaf in turned.momenta(inner_state)]

        if refresh_basis is None:
            due = state.count % _arrays.whole_interval(basis_interval) == 0
            bases, momenta = jax.lax.cond(due, refreshed, kept)
        else:
            bases, momenta = refreshed() if refresh_basis else kept()
        inner_state = turned.with_momenta(inner_state, momenta)

        coordinates = EigenbasisCoordinates(turned, bases)
        if hessian_fn is not None:
            extra_args["hessian_fn"] = _in_coordinates(hessian_fn, coordinates)
        if obj_fn is not None:
            extra_args["obj_fn"] = _of_turned_params(obj_fn, coordinates, params)
        turned_gradients = turned.turn_gradients(bases, matrices, finite, updates)
        moved, inner_state = inner.update(
            turned_gradients,
            inner_state,
            None if params is None else coordinates.turn(params),
            **extra_args,
        )
        moved = turned.without_rounding(moved, inner_state, turned_gradients)
        bad = [jnp.zeros((), jnp.float32), *(jnp.float32(~jnp.asarray(own)) for own in finite)]
        new_state = InEigenbasisState(
            count=_arrays.increment(state.count),
            rejected=jnp.where(
                _manual_axes.sum_of_all_shards(bad) > 0,
                _arrays.increment(state.rejected),
                state.rejected,
            ),
            bases=bases or state.bases,
            inner=jax.tree.map(_restore_dtype, inner_state, state.inner, is_leaf=_trees.is_absent),
        )
        return turned.cast(coordinates.back(moved), updates, params), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _restore_dtype(new: Any, old: Any) -> Any:
    """Rounds a leaf of the inner state to its dtype before: turned gradients are wider."""
    if _trees.is_absent(new) or not _arrays.is_inexact(old):
        return new
    return new.astype(old.dtype)


def _in_coordinates(hessian_fn: HessianFn, coordinates: Coordinates) -> HessianFn:
    """Asks an estimator for its estimate in other coordinates.

    Args:
      hessian_fn: as passed to `update`.
      coordinates: the coordinates.

    Returns:
      The estimator in these coordinates.

    Raises:
      TypeError: if the estimator can only estimate in the parameters' own axes.
    """
    if not callable(hessian_fn):
        return hessian_fn  # for the inner transformation to refuse
    try:
        parameters = inspect.signature(hessian_fn).parameters
    except ValueError:  # written in C
        parameters = {"coordinates": None}
    takes_any = any(p is not None and p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "coordinates" not in parameters and not takes_any:
        raise TypeError(
            f"hessian_fn is {hessian_fn!r}, which takes no `coordinates`, so it cannot estimate "
            "the curvature in the eigenbasis. Use hutchinson or gauss_newton_bartlett, or let it "
            "take the keyword and estimate in them, as sophia_optax.HessianFn documents."
        )

    def estimate(key: PRNGKeyArray, /) -> Params:
        return cast(Any, hessian_fn)(key, coordinates=coordinates)

    return estimate


def _of_turned_params(
    obj_fn: LossFn, coordinates: Coordinates, params: Params | None
) -> Callable[..., Any]:
    """The loss as a function of the turned params, which are what the inner transformation has.

    Args:
      obj_fn: as passed to `update`.
      coordinates: the coordinates.
      params: in their own axes, whose dtypes the loss gets.

    Returns:
      The function.
    """

    def of_turned(turned_params: Params, *args: Any, **kwargs: Any) -> Any:
        own = coordinates.back(turned_params)
        if params is not None:
            own = jax.tree.map(_restore_dtype, own, params, is_leaf=_trees.is_absent)
        return obj_fn(own, *args, **kwargs)

    return of_turned


def _check_stack_sharding(stack_sharding: NamedSharding | None) -> None:
    """Refuses what is not the sharding of one axis.

    Args:
      stack_sharding: as passed to `in_eigenbasis`.

    Raises:
      TypeError: if it is neither None nor a `NamedSharding`.
      ValueError: if its spec does not have exactly one entry.
    """
    if stack_sharding is None:
        return
    if not isinstance(stack_sharding, NamedSharding):
        raise TypeError(
            f"stack_sharding is {stack_sharding!r}. Pass a NamedSharding of one axis, e.g. "
            'NamedSharding(mesh, PartitionSpec("fsdp")), or None.'
        )
    if len(stack_sharding.spec) != 1 or stack_sharding.spec[0] in (
        None,
        PartitionSpec.UNCONSTRAINED,
    ):
        raise ValueError(
            f"stack_sharding has the spec {stack_sharding.spec}, but a stack has one axis to cut. "
            'Name the mesh axes for it, e.g. PartitionSpec("fsdp").'
        )


def _on_mesh_at_hand(stack_sharding: NamedSharding | None) -> NamedSharding | None:
    """A sharding as it is used inside of `jax.shard_map` over other axes of its mesh.

    Args:
      stack_sharding: as passed to `in_eigenbasis`.

    Returns:
      The same one, over the mesh that has manual axes where there are some.

    Raises:
      ValueError: if one of its axes is manual.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if stack_sharding is None or not mesh.manual_axes:
        return stack_sharding
    names = _manual_axes.names(stack_sharding.spec[0])
    if manual := tuple(name for name in names if name in mesh.manual_axes):
        raise ValueError(
            f"stack_sharding cuts stacks along the mesh axes {manual}, which are manual inside of "
            "jax.shard_map. Leave stack_sharding out there: each device turns what it has."
        )
    return NamedSharding(mesh, stack_sharding.spec)


def _check_refresh_basis(refresh_basis: bool | None) -> None:
    """Refuses a traced value.

    Args:
      refresh_basis: as passed to `update`.

    Raises:
      TypeError: if it is neither None, True nor False.
    """
    if not (refresh_basis is None or isinstance(refresh_basis, bool)):
        raise TypeError(
            f"refresh_basis is {refresh_basis!r}, but it is chosen when the step is traced. Pass "
            "None, True or False; for jit, name it in static_argnames."
        )
