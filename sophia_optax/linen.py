"""Flax linen: a `TrainState` whose `apply_gradients` passes keywords on to the optimizer."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from flax import struct
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state
from jaxtyping import PRNGKeyArray

from sophia_optax._types import Coordinates, HessianFn, Params


class TrainState(train_state.TrainState):
    """A Flax `TrainState` that passes keywords on to the optimizer.

    Flax's own passes every keyword of `apply_gradients` to `replace`, so an optimizer with extra
    arguments does not receive them. Here a keyword that names a field of the state is replaced, and
    any other reaches `tx.update`: `hessian_fn`, `refresh`, `obj_fn`, the `value` of
    `optax.contrib.reduce_on_plateau`. So does a misspelled field, which most optimizers
    ignore.

    Example:
      >>> import jax, jax.numpy as jnp, sophia_optax, sophia_optax.linen
      >>> from flax import linen
      >>> model, x = linen.Dense(2), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)
      >>> state = sophia_optax.linen.TrainState.create(
      ...     apply_fn=model.apply, params=params, tx=sophia_optax.sophia_h(1e-2)
      ... )
      >>> loss_fn = lambda params: jnp.mean(state.apply_fn(params, x) ** 2)
      >>> hessian_fn = sophia_optax.hutchinson(loss_fn, state.params)
      >>> state = state.apply_gradients(
      ...     grads=jax.grad(loss_fn)(state.params), hessian_fn=hessian_fn
      ... )
      >>> print(state.step)
      1
    """

    params: Any = struct.field(pytree_node=True)  # Flax says FrozenDict; linen makes plain dicts.
    tx: Any = struct.field(pytree_node=False)  # optax.MultiSteps is not a GradientTransformation.

    def apply_gradients(
        self, *, grads: Any, hessian_fn: HessianFn | None = None, **kwargs: Any
    ) -> "TrainState":
        """Takes a step.

        Args:
          grads: gradients with the structure of `params`.
          hessian_fn: the estimate of the curvature, see `scale_by_sophia`. With the variables of
            FP8 layers among `params`, it may be one for all of them, or for their `"params"`, which
            is what the optimizer moves.
          **kwargs: fields to replace, as in Flax, and arguments for the optimizer, e.g. `refresh`.

        Returns:
          The state after the step.

        Raises:
          TypeError: if a keyword is neither a field nor an argument that the optimizer takes.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        replaced = {name: value for name, value in kwargs.items() if name in fields}
        extra_args = {name: value for name, value in kwargs.items() if name not in fields}
        if hessian_fn is not None:
            fp8 = OVERWRITE_WITH_GRADIENT in grads and callable(hessian_fn)
            extra_args["hessian_fn"] = _of_params(hessian_fn) if fp8 else hessian_fn
        tx = self.tx
        extra_args = _accepted(extra_args, tx.update, type(self).__name__)

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            return tx.update(updates, state, params, **extra_args)

        bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
        stepped = super(TrainState, bound).apply_gradients(grads=grads, **replaced)
        return stepped.replace(tx=tx)


def _accepted(extra_args: dict[str, Any], update: Any, name_of_state: str) -> dict[str, Any]:
    """The keywords for an optimizer, without those of Sophia where it is another one.

    Its signature decides: `optax.MultiSteps` takes all of them, and is not a
    `GradientTransformationExtraArgs`.

    Args:
      extra_args: the keywords that are not fields of the state.
      update: the optimizer's.
      name_of_state: for the error.

    Returns:
      Those that `update` takes.

    Raises:
      TypeError: if it does not take one that is not Sophia's.
    """
    parameters = inspect.signature(update).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return extra_args
    if unknown := sorted(set(extra_args) - set(parameters) - {"hessian_fn", "refresh"}):
        raise TypeError(
            f"apply_gradients got {', '.join(unknown)}, which is neither a field of "
            f"{name_of_state} nor an argument of its optimizer. Add the field, or leave it out."
        )
    return {name: value for name, value in extra_args.items() if name in parameters}


class _CoordinatesOfParams(NamedTuple):
    """Coordinates of the `"params"`, in which the other variables of FP8 layers stay as they are.

    Attributes:
      own: the coordinates.
    """

    own: Coordinates

    def turn(self, tree: Any) -> Any:
        """Into the coordinates."""
        return _map_params(self.own.turn, tree)

    def back(self, tree: Any) -> Any:
        """Out of the coordinates."""
        return _map_params(self.own.back, tree)


def _map_params(function: Callable[[Any], Any], tree: Any) -> Any:
    """Applies a function to the `"params"` of variables, or to a tree that has only those."""
    if OVERWRITE_WITH_GRADIENT not in tree:
        return function(tree)
    return {**tree, "params": function(tree["params"])}


def _of_params(hessian_fn: HessianFn) -> HessianFn:
    """Leaves out of an estimate what the optimizer does not move: the scales of FP8 layers."""

    @functools.wraps(hessian_fn)  # whose signature tells whether it takes coordinates
    def estimate(key: PRNGKeyArray, /, **coordinates: Any) -> Params:
        whole = {name: _CoordinatesOfParams(own) for name, own in coordinates.items()}
        estimated: Any = hessian_fn(key, **whole)
        return estimated["params"] if OVERWRITE_WITH_GRADIENT in estimated else estimated

    return estimate
