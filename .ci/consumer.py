"""A user's typed code, for pyright to check against the installed wheel; it is never run.

Each `ignore` below stands on a mistake. If the wheel's types were not seen, the mistake would not
be found, the `ignore` be superfluous, and that is an error here.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true, reportMissingTypeStubs=true

from typing import Any, assert_type

import jax
import jax.numpy as jnp
import optax  # pyright: ignore[reportMissingTypeStubs]

import sophia_optax
import sophia_optax.plotting


class Fixed:
    """A curvature of one's own."""

    def __call__(self, key: jax.Array, /) -> Any:
        return jnp.ones(3)


class Poisson:
    """A likelihood of one's own."""

    event_ndim = 0

    def sample_residual(self, key: jax.Array, outputs: jax.Array, /) -> jax.Array:
        return jnp.exp(outputs) - jax.random.poisson(key, jnp.exp(outputs))

    def sample_factor(self, key: jax.Array, outputs: jax.Array, /) -> jax.Array:
        return jnp.exp(outputs / 2) * jax.random.rademacher(key, outputs.shape, outputs.dtype)


def outputs_fn(params: jax.Array) -> jax.Array:
    return 2 * params


def train_step(params: jax.Array, state: optax.OptState) -> tuple[optax.Params, optax.OptState]:
    tx = sophia_optax.sophia_g(optax.constant_schedule(1e-3), gamma=0.1)
    assert_type(tx, optax.GradientTransformationExtraArgs)
    estimator = sophia_optax.gauss_newton_bartlett(outputs_fn, params, likelihood=Poisson())
    assert_type(estimator, sophia_optax.HessianFn)
    updates, state = tx.update(params, state, params, hessian_fn=estimator)
    assert_type(sophia_optax.diagnostics(state), sophia_optax.SophiaDiagnostics)
    return optax.apply_updates(params, updates), state


own: sophia_optax.HessianFn = Fixed()
no_estimator: sophia_optax.HessianFn = 3  # pyright: ignore[reportAssignmentType]
sophia_optax.sophia_h("fast")  # pyright: ignore[reportArgumentType]
sophia_optax.hutchinson(outputs_fn, jnp.ones(3), mode="forward")  # pyright: ignore[reportArgumentType]
sophia_optax.sophia_k(1e-3)  # pyright: ignore[reportAttributeAccessIssue]
sophia_optax.plotting.win_rate({"run": [{"step": 0, "win_rate": 0.5}]}).savefig("win_rate.png")
