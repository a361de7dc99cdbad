"""Flax linen: a `TrainState` whose `apply_gradients` forwards `hessian_fn` to the optimizer."""

from typing import Any

import optax
from flax import struct
from flax.training import train_state

from sophia_optax._types import HessianFn


class TrainState(train_state.TrainState):
    """A Flax `TrainState` that forwards `hessian_fn` to the optimizer.

    Flax's own passes every keyword of `apply_gradients` to `replace`, so an optimizer with extra
    arguments does not receive them.

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

    def apply_gradients(
        self,
        *,
        grads: Any,
        hessian_fn: HessianFn | None = None,
        refresh: bool | None = None,
        **kwargs: Any,
    ) -> "TrainState":
        """Takes a step.

        Args:
          grads: gradients with the structure of `params`.
          hessian_fn: the estimate of the curvature, see `scale_by_sophia`.
          refresh: whether an estimate is due, see `scale_by_sophia`.
          **kwargs: other fields to replace, as in Flax.

        Returns:
          The state after the step.
        """
        tx = optax.with_extra_args_support(self.tx)

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            return tx.update(updates, state, params, hessian_fn=hessian_fn, refresh=refresh)

        bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
        stepped = super(TrainState, bound).apply_gradients(grads=grads, **kwargs)
        return stepped.replace(tx=self.tx)
