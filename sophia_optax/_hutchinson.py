"""Hutchinson's estimator of the diagonal of the Hessian (the H in Sophia-H).

For a random vector u with E[u] = 0 and E[u uᵀ] = I, and H = ∇² L(θ), the estimate is u ⊙ (H u).

It is unbiased: coordinate i is u_i Σ_j H_ij u_j, and E[u_i u_j] is 1 for i = j and 0 otherwise, so
the expectation is H_ii.

Its variance, for coordinates of u that are independent with E[u_i⁴] = κ:

    Var = (κ - 1) H_ii² + Σ_{j≠i} H_ij²

Random signs (Rademacher) have κ = 1, the smallest possible, and normals have κ = 3. So Rademacher
is the default. It is exact where the Hessian is diagonal. The paper uses normals.

The Hessian is never formed: H u is the derivative of the gradient in the direction u. There are
three ways to compute it:

    forward_over_reverse   jvp of the gradient. The default: about twice the memory of a gradient.
    reverse_over_reverse   vjp of the gradient. For functions that have a vjp but no jvp, where the
                           forward rule of that vjp can itself be differentiated.
    finite_difference      central difference of two gradients. For kernels with a first derivative
                           only; float32 arithmetic throughout.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sophia_optax import _arrays, _checks, _manual_axes, _trees
from sophia_optax._manual_axes import AxisName
from sophia_optax._types import Coordinates, HessianFn, LossFn, Params

Distribution: TypeAlias = Literal["rademacher", "gaussian"]
Mode: TypeAlias = Literal["forward_over_reverse", "reverse_over_reverse", "finite_difference"]

_Leaves: TypeAlias = list[Array]
_Gradient: TypeAlias = Callable[[_Leaves], _Leaves]


def hutchinson(
    loss_fn: LossFn,
    params: Params,
    *,
    num_probes: int = 1,
    probe_chunk: int = 1,
    distribution: Distribution = "rademacher",
    mode: Mode = "forward_over_reverse",
    axis_name: AxisName | None = None,
) -> HessianFn:
    """Estimates the diagonal of the Hessian of a loss from Hessian-vector products.

    Nothing is computed until the transform calls the result, on every `update_interval`-th step.

    Example:
      >>> import jax, jax.numpy as jnp, sophia_optax
      >>> loss_fn = lambda params: jnp.sum(jnp.array([1.0, 2.0, 3.0]) * params["x"] ** 4)
      >>> hessian_fn = sophia_optax.hutchinson(loss_fn, {"x": jnp.ones(3)})
      >>> print(hessian_fn(jax.random.key(0)))
      {'x': Array([12., 24., 36.], dtype=float32)}

    Args:
      loss_fn: params to the scalar loss, on a batch that it closes over (often a part of the
        step's, see `curvature_batch`). It must be twice differentiable.
      params: the whole params, a pytree with leaves of any shape. Leaves that are not floating
        point stay as they are, and their estimate is zero.
      num_probes: the number of random vectors to average over. The variance is proportional to
        1 / num_probes, the cost to num_probes. The default, 1, is the paper's.
      probe_chunk: the number of probes to compute at the same time; it divides `num_probes`. Memory
        grows with it.
      distribution: "rademacher" (random signs) or "gaussian" (the paper's).
      mode: how the Hessian-vector product is taken, see `docs/concepts/differentiation.md`.
      axis_name: the mesh axes that the batch is split over and the params are not, in a
        `jax.shard_map` or `jax.pmap`: the loss is then averaged over them.

    Returns:
      A `HessianFn`, from a PRNG key to a pytree with the structure and shapes of the params, in
      float32, or wider where a parameter is.

    Raises:
      TypeError: if a parameter is complex, or an argument is not a number.
      ValueError: if a number is out of its range or a name is unknown.
    """
    num_probes = _checks.static_count("num_probes", num_probes)
    probe_chunk = _checks.static_count("probe_chunk", probe_chunk)
    _checks.check_choice("distribution", distribution, ("rademacher", "gaussian"))
    _checks.check_choice("mode", mode, tuple(_PRODUCTS))
    if num_probes % probe_chunk:
        raise ValueError(
            f"probe_chunk is {probe_chunk}, which does not divide num_probes = {num_probes}. "
            "Choose a divisor."
        )
    draw = _arrays.random_signs if distribution == "rademacher" else _arrays.random_normal
    theta = _trees.differentiable(params)
    axes_named = _manual_axes.names(axis_name)

    def loss_of(leaves: _Leaves) -> Float[Array, ""]:
        return _loss_of_all_shards(_scalar(loss_fn(theta.combine(leaves))), axes_named)

    gradient = jax.grad(loss_of)
    product = jax.jit(partial(_PRODUCTS[mode], gradient))

    def one_probe(key: PRNGKeyArray, coordinates: Coordinates | None) -> _Leaves:
        keys = jax.random.split(key, len(theta.leaves))
        u = [
            draw(_manual_axes.fold_in_position(k, _manual_axes.varying(leaf)), leaf)
            for k, leaf in zip(keys, theta.leaves, strict=True)
        ]
        probe = _trees.turned_back(theta, coordinates, u)
        hu = _trees.turned(theta, coordinates, checked_product(probe))
        return [_multiply(a, b) for a, b in zip(u, hu, strict=True)]

    def checked_product(u: _Leaves) -> _Leaves:
        _check_product(mode, product, gradient, theta.leaves, u)
        return product(theta.leaves, u)

    def hessian_fn(key: PRNGKeyArray, /, *, coordinates: Coordinates | None = None) -> Params:
        if not theta.leaves:
            return theta.combine_with_zeros([])
        draw_one = partial(one_probe, coordinates=coordinates)
        mean = _arrays.mean_over_keys(draw_one, key, num_probes, probe_chunk)
        to_average = [axis for axis in axes_named if not _manual_axes.is_tracked(axis)]
        return theta.combine_with_zeros(jax.lax.pmean(mean, to_average) if to_average else mean)

    return hessian_fn


def _multiply(u: Float[Array, "..."], hu: Float[Array, "..."]) -> Float[Array, "..."]:
    """The product u ⊙ H u, in float32 at least."""
    dtype = _arrays.at_least_float32(u.dtype)
    return u.astype(dtype) * hu.astype(dtype)


def _scalar(loss: Any) -> Float[Array, ""]:
    """Checks that a loss is a scalar.

    Args:
      loss: what the loss function returned.

    Returns:
      The same.

    Raises:
      TypeError: if it is not a scalar.
    """
    if jax.tree.structure(loss) != jax.tree.structure(0) or jnp.shape(loss) != ():
        shapes = jax.tree.map(jnp.shape, loss)
        raise TypeError(
            f"loss_fn returned {shapes} (shapes), not a scalar. Reduce it to one number, and drop "
            "auxiliary outputs: lambda params: loss_fn(params)[0]."
        )
    return loss


def _loss_of_all_shards(loss: Float[Array, ""], axes_named: tuple[str, ...]) -> Float[Array, ""]:
    """Averages a loss over the axes named, where its derivative is one of all shards.

    Args:
      loss: of the data on this shard.
      axes_named: what the batch is split over. Where jax does not track them, the derivative is
        this shard's, and the estimate is averaged in the end instead.

    Returns:
      The loss of all shards.

    Raises:
      TypeError: if the loss still varies over an axis.
    """
    to_average = [axis for axis in axes_named if axis in _manual_axes.varying(loss)]
    loss = jax.lax.pmean(loss, to_average) if to_average else loss
    if left := _manual_axes.varying(loss):
        named = repr(left[0] if len(left) == 1 else left)
        raise TypeError(
            f"loss_fn returned a loss that varies over the mesh axes {left}: each shard has that "
            f"of its own data. Pass axis_name={named} to average it, or reduce it in loss_fn, with "
            f"jax.lax.pmean for means and jax.lax.psum for parts of a sum."
        )
    return loss


def _forward_over_reverse(gradient: _Gradient, theta: _Leaves, u: _Leaves) -> _Leaves:
    return jax.jvp(gradient, (theta,), (u,))[1]


def _reverse_over_reverse(gradient: _Gradient, theta: _Leaves, u: _Leaves) -> _Leaves:
    return jax.vjp(gradient, theta)[1](u)[0]


def _finite_difference(gradient: _Gradient, theta: _Leaves, u: _Leaves) -> _Leaves:
    """Central difference (∇L(θ + εu) - ∇L(θ - εu)) / 2ε.

    The step balances rounding, which grows as 1/ε, with truncation, which grows as ε²: the cube
    root of the machine epsilon, times the scale of the params, (1 + ‖θ‖) / ‖u‖.

    Args:
      gradient: the gradient as a function of the params.
      theta: the params.
      u: the probe.

    Returns:
      H u up to the error of the difference.
    """
    size = sum(leaf.size for leaf in theta)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in theta))
    machine_epsilon = max(float(jnp.finfo(leaf.dtype).eps) for leaf in theta)
    step = machine_epsilon ** (1 / 3) * (1 + norm) / max(size, 1) ** 0.5

    def gradient_at(sign: int) -> _Leaves:
        moved = [t + (sign * step).astype(t.dtype) * d for t, d in zip(theta, u, strict=True)]
        return gradient(moved)

    return [
        (above - below) / (2 * step).astype(above.dtype)
        for above, below in zip(gradient_at(+1), gradient_at(-1), strict=True)
    ]


_PRODUCTS = {
    "forward_over_reverse": _forward_over_reverse,
    "reverse_over_reverse": _reverse_over_reverse,
    "finite_difference": _finite_difference,
}


def _primitives(jaxpr: Any) -> set[str]:
    """The names of the primitives in a jaxpr and in those within it."""
    if isinstance(jaxpr, tuple | list):
        return set().union(*map(_primitives, jaxpr))
    if not hasattr(jaxpr, "eqns"):
        return set()
    inner = (_primitives(value) for eqn in jaxpr.eqns for value in eqn.params.values())
    return {eqn.primitive.name for eqn in jaxpr.eqns}.union(*inner)


def _check_product(
    mode: Mode, product: jax.stages.Wrapped, gradient: _Gradient, theta: _Leaves, u: _Leaves
) -> None:
    """Traces a product H u, and says what to do where its mode can't take it.

    Args:
      mode: one of `_PRODUCTS`.
      product: the jitted product in that mode.
      gradient: the gradient as a function of the params.
      theta: the params.
      u: the probe.

    Raises:
      NotImplementedError: if the loss has a gradient but not this second derivative.
      TypeError: if finite differences would be taken in less than float32.
    """
    if mode == "finite_difference":
        narrow = {str(t.dtype) for t in theta if _arrays.at_least_float32(t.dtype) != t.dtype}
        if narrow:
            raise TypeError(
                f'mode="finite_difference" was given {" and ".join(sorted(narrow))} params, whose '
                "rounding drowns a difference of gradients. Keep the params in float32, or choose "
                "another mode."
            )
    try:
        # A forward rule that calls its own function makes jax put the error off until the program
        # is compiled, by a primitive that has no rule for it.
        if "custom_lin" in _primitives(product.trace(theta, u).jaxpr):
            raise TypeError("the forward rule of a custom_vjp has no jvp")
    except Exception as error:
        # If the gradient alone does not trace either, the fault is the loss's own: its error says
        # more than ours could.
        try:
            jax.eval_shape(gradient, theta)
        except Exception:
            raise error from None
        raise NotImplementedError(
            f'mode="{mode}" cannot differentiate this loss twice, although its gradient exists; '
            "the usual cause is a kernel with a hand-written derivative, such as cuDNN or Pallas "
            "attention. Choose another mode ("
            + ", ".join(f'"{other}"' for other in _PRODUCTS if other != mode)
            + "), or give the curvature a loss with plain attention, or use gauss_newton_bartlett, "
            "which needs first derivatives only."
        ) from error
