"""Flax NNX: makes functions of params from models, for the estimators."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from sophia_optax._types import LossFn, OutputsFn, Params


def functional_loss(
    model: nnx.Module,
    loss_fn: Callable[..., Float[Array, ""]],
    *args: Any,
    wrt: nnx.filterlib.Filter = nnx.Param,
) -> tuple[LossFn, Params]:
    """Makes a function of params, for `hutchinson`, from a loss of a model.

    The loss changes random streams and batch statistics in a copy of the model only. So it can run
    inside `jit` and be differentiated twice, Dropout included.

    Example:
      >>> import jax, jax.numpy as jnp, sophia_optax, sophia_optax.nnx
      >>> from flax import nnx
      >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, sophia_optax.sophia_h(1e-2), wrt=nnx.Param)
      >>> loss_fn = lambda model, x: jnp.mean(model(x) ** 2)
      >>> x = jnp.ones((4, 3))
      >>> grads = nnx.grad(loss_fn)(model, x)
      >>> hessian_fn = sophia_optax.hutchinson(
      ...     *sophia_optax.nnx.functional_loss(model, loss_fn, x)
      ... )
      >>> _ = optimizer.update(model, grads, hessian_fn=hessian_fn)

    Args:
      model: the model, whose state stays as it is.
      loss_fn: the model and `args` to a scalar loss.
      *args: the other arguments of the loss, e.g. a batch.
      wrt: which variables are the params, as for `nnx.Optimizer`.

    Returns:
      The loss as a function of params, and the params, in the structure that
      `nnx.Optimizer.update` passes to Optax.
    """
    return _functional(model, loss_fn, args, wrt)


def functional_outputs(
    model: nnx.Module,
    forward: Callable[..., Float[Array, "..."]],
    *args: Any,
    wrt: nnx.filterlib.Filter = nnx.Param,
) -> tuple[OutputsFn, Params]:
    """Makes a function of params, for `gauss_newton_bartlett`, from a model's forward pass.

    Example:
      >>> import jax, jax.numpy as jnp, sophia_optax, sophia_optax.nnx
      >>> from flax import nnx
      >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> hessian_fn = sophia_optax.gauss_newton_bartlett(
      ...     *sophia_optax.nnx.functional_outputs(model, lambda m, x: m(x), jnp.ones((4, 3)))
      ... )

    Args:
      model: the model, whose state stays as it is.
      forward: the model and `args` to its outputs.
      *args: its other arguments, e.g. the inputs.
      wrt: which variables are the params, as for `nnx.Optimizer`.

    Returns:
      The outputs as a function of params, and the params, in the structure that
      `nnx.Optimizer.update` passes to Optax.
    """
    return _functional(model, forward, args, wrt)


def _functional(
    model: nnx.Module,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    wrt: nnx.filterlib.Filter,
) -> tuple[Callable[[Any], Any], Params]:
    graphdef, params, rest = nnx.split(model, wrt, ...)

    def of_params(params: Params) -> Any:
        return function(nnx.merge(graphdef, params, rest, copy=True), *args)

    return of_params, nnx.as_pure(params)
