"""Small trees, estimators and updates that the tests of the transform share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sophia_optax

Tree = Any
PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.1, -0.3, 0.7])}

GRADS = {"w": jnp.array([[0.3, -0.1], [2.0, -5.0]]), "b": jnp.array([1e-3, 0.0, -0.4])}
HESSIAN = {"w": jnp.array([[10.0, 200.0], [-3.0, 1e3]]), "b": jnp.array([0.0, 5.0, 60.0])}


def constant(tree: Tree) -> Callable[[jax.Array], Tree]:
    """An estimator that always returns `tree`."""
    return lambda key: tree


def numbered(tree: Tree) -> Callable[[jax.Array], Tree]:
    """An estimator that is different at each step: `tree` scaled by a function of the key."""
    return lambda key: jax.tree.map(lambda x: x * jax.random.uniform(key, minval=0.5), tree)


class Calls:
    """Counts real executions of an estimator, compiled or not."""

    def __init__(self, hessian_fn: Callable[..., Tree]) -> None:
        self.hessian_fn = hessian_fn
        self._count = 0

    def __call__(self, key: jax.Array, **coordinates: Any) -> Tree:
        jax.debug.callback(self._one_more)
        return self.hessian_fn(key, **coordinates)

    def _one_more(self, *_: Any) -> None:
        self._count += 1

    def so_far(self) -> int:
        jax.effects_barrier()
        return self._count


def jitted_update(tx: Any, hessian_fn: Any = None, **kwargs: Any) -> Any:
    return jax.jit(lambda g, s, p: tx.update(g, s, p, hessian_fn=hessian_fn, **kwargs))


def sophia_state(state: Any) -> sophia_optax.ScaleBySophiaState:
    (found,) = optax.tree.get_all_with_path(state, "ScaleBySophiaState")
    return found[1]
