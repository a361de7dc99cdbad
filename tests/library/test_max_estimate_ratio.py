"""`max_estimate_ratio`: an estimate that is finite but absurd is dropped and counted."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sophia_optax
from tests.transforms import GRADS, HESSIAN, PARAMS, sophia_state

Tree = Any


def after(tx: Any, factors: Any, params: Tree = PARAMS, hessian: Tree = HESSIAN) -> Any:
    """The state after a refresh for each factor, by which the estimate is scaled; all states."""

    def step(state: Any, factor: jax.Array) -> Any:
        estimate = jax.tree.map(lambda h: factor * h, hessian)
        grads = jax.tree.map(lambda p: 0.1 * jnp.ones_like(p), params)
        updates, state = tx.update(grads, state, params, hessian_fn=lambda key: estimate)
        return state, (updates, state)

    scan = jax.jit(lambda xs: jax.lax.scan(step, tx.init(params), xs))
    return scan(jnp.asarray(factors, jnp.float32))


def scale(**keywords: Any) -> Any:
    return sophia_optax.scale_by_sophia(update_interval=1, **keywords)


@pytest.mark.parametrize("gamma", (0.05, sophia_optax.win_rate_target()), ids=("fixed", "target"))
def test_an_absurd_estimate_is_rejected_and_counted_as_one_that_is_not_finite(gamma: Any) -> None:
    tx = scale(max_estimate_ratio=100.0, gamma=gamma)
    absurd, _ = after(tx, [1, 1, 1e30, 1])
    not_finite, _ = after(tx, [1, 1, np.nan, 1])
    chex.assert_trees_all_equal(absurd, not_finite)
    assert (absurd.refreshes, absurd.rejected) == (3, 1)


def test_one_absurd_coordinate_is_enough() -> None:
    tx = scale(max_estimate_ratio=100.0)
    _, state = tx.update(GRADS, tx.init(PARAMS), hessian_fn=lambda key: HESSIAN)
    bad = {**HESSIAN, "b": HESSIAN["b"].at[1].set(-1e30)}
    _, state = tx.update(GRADS, state, hessian_fn=lambda key: bad, refresh=True)
    assert state.rejected == 1


@pytest.mark.parametrize("bias_correction", (True, False))
@pytest.mark.parametrize("before", (1, 20))
@pytest.mark.parametrize(("factor", "rejected"), ((9.9, 0), (10.1, 1)))
def test_the_limit_is_a_multiple_of_the_average_of_the_estimates_so_far(
    factor: float, rejected: int, before: int, bias_correction: bool
) -> None:
    tx = scale(max_estimate_ratio=10.0, bias_correction=bias_correction)
    state, _ = after(tx, [3] * before + [3 * factor])
    assert state.rejected == rejected


@pytest.mark.parametrize("unit", (1e-30, 1.0, 1e30))
def test_the_limit_does_not_depend_on_the_unit_of_the_loss(unit: float) -> None:
    state, _ = after(scale(max_estimate_ratio=10.0), unit * np.array([1, 9, 60, 1]))
    assert (state.refreshes, state.rejected) == (3, 1)


def test_any_estimate_is_accepted_first_and_while_h_is_zero() -> None:
    state, _ = after(scale(max_estimate_ratio=1.0), [0, 0, 1e6])
    assert (state.refreshes, state.rejected) == (3, 0)


def test_a_limit_that_is_not_reached_changes_no_number() -> None:
    factors = [1, 3, 0.2, 7]
    chex.assert_trees_all_equal(
        after(scale(max_estimate_ratio=1e6), factors), after(scale(), factors)
    )


def test_without_a_limit_an_absurd_estimate_shortens_steps_for_hundreds_of_refreshes() -> None:
    """And with one for none."""

    def short(**keywords: Any) -> int:
        tx = scale(b1=0.0, gamma=1.0, clip_threshold=None, **keywords)
        _, (updates, _) = after(tx, [1, 1e6] + [1] * 1200, jnp.ones(()), jnp.ones(()))
        return int(jnp.sum(updates < 0.05))

    assert short(max_estimate_ratio=100.0) == 0
    assert 900 < short() < 940


def test_the_limit_takes_a_schedule_and_holds_in_the_aliases_and_the_eigenbasis() -> None:
    injected = optax.inject_hyperparams(sophia_optax.sophia_g)
    for tx in (
        sophia_optax.sophia_h(1e-2, update_interval=1, max_estimate_ratio=10.0),
        injected(1e-2, update_interval=1, max_estimate_ratio=lambda count: 10.0),
    ):
        state, _ = after(tx, [1, 1e6, 1])
        assert sophia_state(state).rejected == 1
    tx = sophia_optax.sophia_g(1e-2, eigenbasis=True, update_interval=1, max_estimate_ratio=10.0)
    state = tx.init(PARAMS)
    for factor in (1.0, 1e6):
        _, state = tx.update(
            GRADS,
            state,
            PARAMS,
            hessian_fn=lambda key, coordinates, f=factor: {
                name: f * jnp.abs(h) for name, h in HESSIAN.items()
            },
        )
    assert sophia_state(state).rejected == 1


def test_an_absurd_coordinate_on_one_device_of_eight_is_rejected_on_all() -> None:
    rows = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    params = jax.device_put(jnp.ones((16, 2)), rows)
    bad = jax.device_put(jnp.ones((16, 2)).at[5, 1].set(1e30), rows)
    tx = scale(max_estimate_ratio=10.0)

    @jax.jit
    def update(state: Any, estimate: jax.Array) -> Any:
        return tx.update(params, state, params, hessian_fn=lambda key: estimate)[1]

    with jax.set_mesh(rows.mesh):
        before = update(tx.init(params), params)
        state = update(before, bad)
    assert (state.refreshes, state.rejected) == (1, 1)
    chex.assert_trees_all_equal(state.nu, before.nu)
