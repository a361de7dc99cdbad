"""When the curvature is refreshed, what is rejected, and what the win rate counts."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax
from tests.transforms import (
    GRADS,
    HESSIAN,
    PARAMS,
    Calls,
    constant,
    jitted_update,
    numbered,
    sophia_state,
)

Tree = Any


# Refreshes


def test_estimator_runs_on_refreshes_alone_under_jit() -> None:
    calls = Calls(constant(HESSIAN))
    tx = sophia_optax.scale_by_sophia(update_interval=4)
    update, state = jitted_update(tx, calls), tx.init(PARAMS)
    so_far, nus = [], []
    for _ in range(10):
        _, state = update(GRADS, state, PARAMS)
        so_far.append(calls.so_far())
        nus.append(np.asarray(state.nu["w"]))
    assert so_far == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    assert state.refreshes == 3
    np.testing.assert_array_equal(nus[4], nus[7])
    assert np.all(nus[3] != nus[4])


def test_estimator_runs_on_refreshes_alone_under_scan() -> None:
    calls = Calls(constant(HESSIAN))
    tx = sophia_optax.scale_by_sophia(update_interval=4)

    @jax.jit
    def train(state: Any) -> Any:
        def body(state: Any, _: Any) -> Any:
            return tx.update(GRADS, state, PARAMS, hessian_fn=calls)[1], None

        return jax.lax.scan(body, state, length=10)[0]

    assert train(tx.init(PARAMS)).refreshes == 3
    assert calls.so_far() == 3


def test_estimator_runs_on_refreshes_alone_when_hyperparameters_are_injected() -> None:
    calls = Calls(constant(HESSIAN))
    tx = optax.inject_hyperparams(sophia_optax.sophia_h)(
        optax.constant_schedule(1e-2), update_interval=4
    )
    update, state = jitted_update(tx, calls), tx.init(PARAMS)
    for _ in range(10):
        _, state = update(GRADS, state, PARAMS)
    assert calls.so_far() == 3


@pytest.mark.parametrize("wrapped_first", ("inject", "multi_steps"))
def test_estimator_runs_once_a_refresh_under_multi_steps(wrapped_first: str) -> None:
    """Once per refresh, on the mini-step that emits; bare, MultiSteps would run it on each."""
    interval, every_k, mini_steps = 2, 3, 15

    def make(**kwargs: Any) -> Any:
        if wrapped_first == "inject":
            return optax.inject_hyperparams(sophia_optax.sophia_h)(1e-2, **kwargs)
        return sophia_optax.sophia_h(1e-2, **kwargs)

    multi = optax.MultiSteps(make(update_interval=interval), every_k)
    calls = Calls(numbered(HESSIAN))

    @jax.jit
    def update(state: Any) -> Any:
        hessian_fn = sophia_optax.on_emit(calls, state, every_k)
        return multi.update(GRADS, state, PARAMS, hessian_fn=hessian_fn)

    state, so_far = multi.init(PARAMS), []
    for _ in range(mini_steps):
        updates, state = update(state)
        so_far.append(calls.so_far())
    # Emitting steps are mini-steps 2, 5, 8, 11, 14; the 1st, 3rd and 5th of them refresh.
    assert so_far == [0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3]
    inner = sophia_state(state)
    assert (int(inner.count), int(inner.refreshes), int(inner.rejected)) == (5, 3, 0)

    alone = sophia_optax.sophia_h(1e-2, update_interval=interval)
    alone_update, expected = jitted_update(alone, numbered(HESSIAN)), alone.init(PARAMS)
    for _ in range(mini_steps // every_k):
        expected_updates, expected = alone_update(GRADS, expected, PARAMS)
    chex.assert_trees_all_close(updates, expected_updates, rtol=1e-5)
    chex.assert_trees_all_close(inner.nu, sophia_state(expected).nu, rtol=1e-5)


def test_on_emit_follows_a_schedule_of_mini_steps() -> None:
    def every_k(gradient_step: Any) -> Any:
        return jnp.where(gradient_step < 2, 1, 3)

    multi = optax.MultiSteps(sophia_optax.sophia_h(1e-2, update_interval=1), every_k)
    calls = Calls(constant(HESSIAN))

    @jax.jit
    def update(state: Any) -> Any:
        hessian_fn = sophia_optax.on_emit(calls, state, every_k)
        return multi.update(GRADS, state, PARAMS, hessian_fn=hessian_fn)[1]

    state, so_far = multi.init(PARAMS), []
    for _ in range(8):
        state = update(state)
        so_far.append(calls.so_far())
    assert so_far == [1, 2, 2, 2, 3, 3, 3, 4]
    assert sophia_state(state).refreshes == 4


def test_an_every_k_that_multi_steps_does_not_have_is_counted_as_rejected_estimates() -> None:
    """The estimates would be missing on every mini-step that emits. Zeros would shrink h."""
    multi = optax.MultiSteps(sophia_optax.sophia_h(1e-2, update_interval=1), 2)
    state = multi.init(PARAMS)
    for _ in range(4):
        hessian_fn = sophia_optax.on_emit(constant(HESSIAN), state, 3)
        _, state = multi.update(GRADS, state, PARAMS, hessian_fn=hessian_fn)
    inner = sophia_state(state)
    assert (int(inner.count), int(inner.refreshes), int(inner.rejected)) == (2, 0, 2)


def test_refresh_true_refreshes_off_schedule_and_false_does_not_on_it() -> None:
    calls = Calls(constant(HESSIAN))
    tx = sophia_optax.scale_by_sophia(update_interval=3)
    always = jitted_update(tx, calls, refresh=True)
    never = jitted_update(tx, calls, refresh=False)
    _, state = never(GRADS, tx.init(PARAMS), PARAMS)
    assert (int(state.count), int(state.refreshes), calls.so_far()) == (1, 0, 0)
    for refreshes in (1, 2):
        _, state = always(GRADS, state, PARAMS)
        assert (int(state.refreshes), calls.so_far()) == (refreshes, refreshes)


def test_two_compiled_steps_scheduled_from_the_host_are_the_one_step_with_a_branch() -> None:
    interval = 3
    tx = sophia_optax.scale_by_sophia(update_interval=interval)
    by_cond = jitted_update(tx, numbered(HESSIAN))
    by_host = {
        refresh: jitted_update(tx, numbered(HESSIAN), refresh=refresh) for refresh in (True, False)
    }
    expected = actual = tx.init(PARAMS)
    for t in range(7):
        expected_updates, expected = by_cond(GRADS, expected, PARAMS)
        updates, actual = by_host[t % interval == 0](GRADS, actual, PARAMS)
        chex.assert_trees_all_close(updates, expected_updates, rtol=1e-6)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)


def test_refresh_false_needs_no_estimator() -> None:
    tx = sophia_optax.scale_by_sophia()
    _, state = jitted_update(tx, None, refresh=False)(GRADS, tx.init(PARAMS), PARAMS)
    assert state.count == 1


def test_vmap_turns_the_branch_into_a_select_unless_refresh_is_fixed() -> None:
    """Documented, not wanted: over a batch of counts the estimator runs on every step."""
    calls = Calls(constant(HESSIAN))
    tx = sophia_optax.scale_by_sophia(update_interval=2)
    batch = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), GRADS)
    state = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(2))

    def update(refresh: bool | None) -> Any:
        return jax.jit(
            jax.vmap(lambda g, s: tx.update(g, s, PARAMS, hessian_fn=calls, refresh=refresh))
        )

    _, state = update(None)(batch, state)
    before = calls.so_far()
    _, after = update(None)(batch, state)
    assert calls.so_far() > before
    chex.assert_trees_all_equal(after.nu, state.nu)
    before = calls.so_far()
    _, fixed = update(False)(batch, state)
    assert calls.so_far() == before
    chex.assert_trees_all_equal(fixed, after)


# Rejected estimates


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
def test_a_non_finite_estimate_is_dropped_whole_counted_and_changes_nothing(bad: float) -> None:
    """One coordinate is enough, and the good leaf next to it is not taken either."""
    tx = sophia_optax.scale_by_sophia(update_interval=1)
    good = jitted_update(tx, constant(HESSIAN))
    poisoned = {"w": HESSIAN["w"].at[1, 0].set(bad), "b": HESSIAN["b"]}
    rejecting = jitted_update(tx, constant(poisoned))
    skipping = jitted_update(tx, refresh=False)
    _, state = good(GRADS, tx.init(PARAMS), PARAMS)
    gradient = jax.tree.map(lambda g: -2 * g, GRADS)
    updates, rejected = rejecting(gradient, state, PARAMS)
    expected_updates, expected = skipping(gradient, state, PARAMS)
    assert (int(rejected.rejected), int(expected.rejected)) == (1, 0)
    chex.assert_trees_all_equal(updates, expected_updates)
    chex.assert_trees_all_equal(rejected._replace(rejected=expected.rejected), expected)
    _, recovered = good(GRADS, rejected, PARAMS)
    assert (int(recovered.refreshes), int(recovered.rejected)) == (2, 1)
    chex.assert_tree_all_finite(recovered)


def test_an_estimate_that_overflows_the_dtype_of_nu_is_rejected() -> None:
    tx = sophia_optax.scale_by_sophia(nu_dtype=jnp.dtype("float16"))
    estimate = jax.tree.map(lambda h: h * 1e6, HESSIAN)
    _, state = jitted_update(tx, constant(estimate))(GRADS, tx.init(PARAMS), PARAMS)
    assert (int(state.refreshes), int(state.rejected)) == (0, 1)
    chex.assert_trees_all_equal(state.nu, jax.tree.map(jnp.zeros_like, state.nu))


def test_a_non_finite_estimate_of_a_leaf_that_is_not_owned_does_not_count() -> None:
    tx = optax.masked(sophia_optax.scale_by_sophia(), {"w": True, "b": False})
    estimate = {"w": HESSIAN["w"], "b": HESSIAN["b"] * jnp.nan}
    _, state = jitted_update(tx, constant(estimate))(GRADS, tx.init(PARAMS), PARAMS)
    assert (int(sophia_state(state).refreshes), int(sophia_state(state).rejected)) == (1, 0)


# Win rate


def test_win_rate_is_the_share_of_coordinates_not_clipped_at_the_last_accepted_refresh() -> None:
    b1, gamma, eps, rho = 0.5, 0.1, 1e-12, 0.5
    tx = sophia_optax.scale_by_sophia(b1, 0.0, eps, gamma, rho, 2)
    rng = np.random.default_rng(0)
    shapes = {"a": (7, 5), "b": (11,), "c": ()}
    state = tx.init({name: jnp.zeros(shape) for name, shape in shapes.items()})
    m = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    update = jax.jit(lambda g, e, s: tx.update(g, s, g, hessian_fn=lambda key: e))
    shown = 0.0
    for t in range(4):
        g, h = (
            {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}
            for _ in range(2)
        )
        _, state = update(g, h, state)
        m = {name: b1 * m[name] + (1 - b1) * g[name] for name in shapes}
        won = np.concatenate(
            [np.ravel(np.abs(m[n]) < rho * np.maximum(gamma * np.abs(h[n]), eps)) for n in shapes]
        )
        if t % 2 == 0:
            shown = won.mean()
            assert 0 < shown < 1
        assert float(state.win_rate) == pytest.approx(shown, rel=1e-6)


@pytest.mark.parametrize("share", (0.7001, 1.0))
def test_win_rate_is_right_beyond_the_integers_of_float32(share: float) -> None:
    """2^25 coordinates: a sum of ones in float32 stops at 2^24."""
    size = 2**25
    tx = sophia_optax.scale_by_sophia(
        b1=0.0, b2=0.0, gamma=1.0, nu_dtype=jnp.dtype("bfloat16"), bias_correction=False
    )

    @jax.jit
    def win_rate() -> jax.Array:
        large = jnp.arange(size) >= int(share * size)
        grads = jnp.where(large, 2.0, 0.5).astype(jnp.bfloat16)
        hessian_fn = constant(jnp.ones(size, jnp.bfloat16))
        return tx.update(grads, tx.init(grads), grads, hessian_fn=hessian_fn, refresh=True)[
            1
        ].win_rate

    assert float(win_rate()) == pytest.approx(share, abs=1e-6)


def test_win_rate_counts_owned_real_coordinates_only() -> None:
    """Masked leaves, integers and empty leaves are no coordinates."""
    tx = optax.masked(
        sophia_optax.scale_by_sophia(b1=0.0, b2=0.0, gamma=1.0),
        {"won": True, "lost": True, "other": False, "int": True, "empty": True},
    )
    grads = {
        "won": jnp.full(3, 0.5),
        "lost": jnp.full(1, 2.0),
        "other": jnp.full(100, 2.0),
        "int": jnp.zeros(100, jnp.int32),
        "empty": jnp.zeros((0, 4)),
    }
    estimate = jax.tree.map(jnp.ones_like, grads)
    _, state = jitted_update(tx, constant(estimate))(grads, tx.init(grads), grads)
    assert float(sophia_state(state).win_rate) == 0.75


@pytest.mark.parametrize(
    ("interval", "expected"), [(2.999999, [0, 3, 6]), (0.0, [*range(9)]), (-3.0, [*range(9)])]
)
def test_a_traced_interval_is_rounded_to_a_whole_number_of_at_least_one(
    interval: float, expected: list[int]
) -> None:
    """Truncated, 2.999999, which a schedule computes instead of 3, would be 2."""
    tx = optax.inject_hyperparams(sophia_optax.scale_by_sophia)(
        update_interval=lambda t: jnp.float32(interval) + 0 * t
    )
    update, state, refreshed = jitted_update(tx, constant(HESSIAN)), tx.init(PARAMS), []
    for t in range(9):
        before = int(sophia_state(state).refreshes)
        _, state = update(GRADS, state, PARAMS)
        refreshed += [t] * (int(sophia_state(state).refreshes) - before)
    assert refreshed == expected


@pytest.mark.parametrize("refreshes", (1, 2))
@pytest.mark.parametrize("b2", (0.0, 0.3, 0.9999))
def test_the_derivative_by_b2_is_that_of_the_formula(b2: float, refreshes: int) -> None:
    """At b2 = 0 too, where the logarithm has none."""
    estimates = (1.0, 3.0)[:refreshes]

    def corrected(b2: jax.Array) -> jax.Array:
        tx = sophia_optax.scale_by_sophia(0.0, b2, gamma=1.0, update_interval=1)
        x = jnp.full((), 0.25)
        state = tx.init(x)
        for estimate in estimates:
            updates, state = tx.update(x, state, hessian_fn=constant(jnp.full((), estimate)))
        return 0.25 / updates

    # With two estimates h is (1 - b2) (b2 e + e') / (1 - b2²) = (b2 e + e') / (1 + b2).
    expected = 0.0 if refreshes == 1 else (estimates[0] - estimates[1]) / (1 + b2) ** 2
    np.testing.assert_allclose(jax.grad(corrected)(jnp.float32(b2)), expected, rtol=0.02, atol=0.02)


def test_a_coordinate_at_the_limit_counts_as_clipped() -> None:
    tx = sophia_optax.scale_by_sophia(b1=0.0, b2=0.0, gamma=1.0)
    gradient = jnp.array([0.5, 1.0])
    _, state = jitted_update(tx, constant(jnp.ones(2)))(gradient, tx.init(gradient), gradient)
    assert state.win_rate == 0.5


@pytest.mark.parametrize("gamma", [0.01, sophia_optax.win_rate_target(0.5)])
def test_the_win_rate_of_a_tree_without_coordinates_is_zero(gamma: Any) -> None:
    tx = sophia_optax.scale_by_sophia(gamma=gamma)
    _, state = jitted_update(tx, constant({}))({}, tx.init({}), {})
    assert (float(state.win_rate), int(state.refreshes), int(state.rejected)) == (0.0, 1, 0)


def test_estimates_in_half_precision_of_numpy_are_averaged_in_float32() -> None:
    tx = sophia_optax.scale_by_sophia()
    estimate = np.full(2, 3.0, np.float16)
    _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), hessian_fn=constant(estimate))
    np.testing.assert_allclose(state.nu, 0.03, rtol=1e-6)
