"""The laws of the transform: when h is refreshed, from what, in which dtype; what errors say."""

import functools
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import orbax.checkpoint
import pytest

import sophia_optax
from tests import oracles, problems

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

    def __init__(self, hessian_fn: Callable[[jax.Array], Tree]) -> None:
        self.hessian_fn = hessian_fn
        self._count = 0

    def __call__(self, key: jax.Array) -> Tree:
        jax.debug.callback(self._one_more)
        return self.hessian_fn(key)

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


# The step


def test_h_is_refreshed_before_it_is_used() -> None:
    """With b1 = b2 = 0 the first update is already clip(g / max(gamma h, eps))."""
    tx = sophia_optax.scale_by_sophia(b1=0.0, b2=0.0, gamma=0.1, eps=1e-12)
    updates, state = jitted_update(tx, constant(HESSIAN))(GRADS, tx.init(PARAMS), PARAMS)
    expected = jax.tree.map(
        lambda g, h: np.clip(np.asarray(g) / np.maximum(0.1 * np.asarray(h), 1e-12), -1, 1),
        GRADS,
        HESSIAN,
    )
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    chex.assert_trees_all_equal(state.nu, HESSIAN)
    assert np.abs(np.asarray(expected["w"])[0, 0]) < 1


@pytest.mark.parametrize("absolute", (True, False))
@pytest.mark.parametrize("bias_correction", (True, False))
def test_update_is_the_formula_with_h_corrected_by_accepted_refreshes(
    bias_correction: bool, absolute: bool
) -> None:
    """Eight steps in NumPy, with a refresh every other step, of which the second is rejected."""
    b1, b2, gamma, eps, rho, k = 0.8, 0.9, 0.05, 1e-6, 0.9, 2
    tx = sophia_optax.scale_by_sophia(
        *(b1, b2, eps, gamma, rho, k),
        bias_correction=bias_correction,
        absolute_curvature=absolute,
        nu_dtype=jnp.dtype("float32"),
    )
    rng = np.random.default_rng(0)
    state = tx.init(PARAMS["b"])
    m, h, accepted = np.zeros(3), np.zeros(3), 0
    update = jax.jit(lambda g, e, s: tx.update(g, s, PARAMS["b"], hessian_fn=lambda key: e))
    for t in range(8):
        g, estimate = rng.normal(size=3), rng.normal(size=3) * 10
        if t == 2:
            estimate[1] = np.inf
        m = b1 * m + (1 - b1) * g
        if t % k == 0 and t != 2:
            h = b2 * h + (1 - b2) * estimate
            accepted += 1
        used = h / (1 - b2**accepted) if bias_correction else h
        used = np.abs(used) if absolute else used
        expected = np.clip(m / np.maximum(gamma * used, eps), -rho, rho)
        updates, state = update(
            jnp.asarray(g, jnp.float32), jnp.asarray(estimate, jnp.float32), state
        )
        np.testing.assert_allclose(updates, expected, rtol=2e-5, atol=1e-7)
        np.testing.assert_allclose(state.mu, m, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(state.nu, h, rtol=1e-5, atol=1e-7)
        if t % k == 0 and t != 2:
            unclipped = np.mean(np.abs(m) < rho * np.maximum(gamma * used, eps))
            np.testing.assert_allclose(state.win_rate, unclipped, rtol=1e-6)
    assert (int(state.count), int(state.refreshes), int(state.rejected)) == (8, 3, 1)


def test_before_any_accepted_refresh_the_update_is_a_sign_step() -> None:
    tx = sophia_optax.scale_by_sophia(clip_threshold=0.7)
    updates, state = jitted_update(tx, refresh=False)(GRADS, tx.init(PARAMS), PARAMS)
    expected = jax.tree.map(lambda g: 0.7 * jnp.sign(g), GRADS)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    assert state.refreshes == 0


def test_without_a_clip_threshold_nothing_is_clipped() -> None:
    tx = sophia_optax.scale_by_sophia(b1=0.0, b2=0.0, gamma=0.01, eps=1e-3, clip_threshold=None)
    updates, state = jitted_update(tx, constant(HESSIAN))(GRADS, tx.init(PARAMS), PARAMS)
    expected = jax.tree.map(lambda g, h: g / jnp.maximum(0.01 * jnp.abs(h), 1e-3), GRADS, HESSIAN)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    assert np.max(np.abs(updates["w"])) > 1
    won = np.concatenate([np.ravel(np.abs(x) < 1) for x in jax.tree.leaves(expected)])
    assert float(state.win_rate) == pytest.approx(won.mean())


@pytest.mark.parametrize("absolute", (True, False))
def test_negative_curvature_steps_downhill_by_its_size_or_by_its_sign(absolute: bool) -> None:
    keywords = {} if absolute else {"absolute_curvature": False}
    tx = sophia_optax.scale_by_sophia(b1=0.0, b2=0.0, gamma=1.0, **keywords)
    updates, _ = jitted_update(tx, constant(jax.tree.map(lambda h: -1e6 + 0 * h, HESSIAN)))(
        GRADS, tx.init(PARAMS), PARAMS
    )
    expected = jax.tree.map(lambda g: g / 1e6 if absolute else jnp.sign(g), GRADS)
    chex.assert_trees_all_close(updates, expected)


# Trajectories in float64 against NumPy


def trajectory(
    tx: Any, grads: Any, hessian_fn_at: Any, start: np.ndarray, steps: int
) -> np.ndarray:
    """The params before the first step and after each, in the dtype of the start."""

    @jax.jit
    def step(params: Any, state: Any, t: Any) -> Any:
        hessian_fn = hessian_fn_at(params, t)
        updates, state = tx.update(grads(params, t), state, params, hessian_fn=hessian_fn)
        return optax.apply_updates(params, updates), state

    params = jnp.asarray(start)
    assert params.dtype == start.dtype
    state, seen = tx.init(params), [start]
    for t in range(steps):
        params, state = step(params, state, t)
        seen.append(np.asarray(params))
    return np.stack(seen)


@pytest.mark.parametrize("bias_correction", (True, False))
def test_trajectory_is_that_of_a_transcription_of_the_paper(bias_correction: bool) -> None:
    """To float64 rounding, through clipped and free steps and curvature of both signs."""
    scales = np.array([0.3, 4.0, 50.0, -1.0])

    def grads(params: Any, t: Any) -> Any:
        return scales * params + 0.3 * params**3 + 0.01 * t

    def estimate(params: Any, t: Any) -> Any:
        return scales + 0.9 * params**2 + t % 5

    start, steps = np.array([1.0, -2.0, 0.5, 0.2]), 40
    keywords = {
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-12,
        "gamma": 0.3,
        "clip_threshold": 0.8,
        "update_interval": 3,
        "learning_rate": 0.05,
        "weight_decay": 0.1,
        "bias_correction": bias_correction,
    }
    papers = {"absolute_curvature": False}
    expected = oracles.sophia_trajectory(grads, estimate, start, steps=steps, **keywords)
    with jax.enable_x64(True):
        tx = sophia_optax.sophia_h(nu_dtype=jnp.dtype("float64"), **papers, **keywords)
        actual = trajectory(
            tx, grads, lambda params, t: lambda key: estimate(params, t), start, steps
        )
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-13)


def test_trajectory_is_that_of_the_official_sophiag_one_refresh_later() -> None:
    """Logistic regression, labels sampled from the model with the same uniforms on both sides.

    The official code folds the estimate in at the end of step k - 1, 2k - 1, ...; here that is the
    beginning of step k, 2k, ..., and the estimate of step 0 is zero. Its batch size is part of the
    estimate here.
    """
    rng = np.random.default_rng(0)
    steps, interval, batch = 40, 4, 16
    inputs = rng.normal(size=(batch, 5)) * np.array([3.0, 1.0, 1.0, 0.3, 0.1])
    labels = rng.integers(0, 2, size=batch)
    uniforms = rng.uniform(size=(steps + 1, batch))

    def residuals(xp: Any, params: Any, targets: Any) -> Any:
        return (1 / (1 + xp.exp(-inputs @ params)) - targets) @ inputs / batch

    def sampled_grads(xp: Any, params: Any, t: Any) -> Any:
        sampled = xp.asarray(uniforms)[t] < 1 / (1 + xp.exp(-inputs @ params))
        return residuals(xp, params, sampled * 1.0)

    start = rng.normal(size=5)
    shared = {"learning_rate": 0.03, "b1": 0.9, "b2": 0.8, "weight_decay": 0.2}
    expected = oracles.official_sophiag_trajectory(
        lambda params, t: residuals(np, params, labels),
        lambda params, t: sampled_grads(np, params, t),
        start,
        steps=steps,
        rho=0.4,
        batch_size=batch,
        update_interval=interval,
        **shared,
    )
    with jax.enable_x64(True):
        tx = sophia_optax.sophia_g(
            gamma=0.4,
            eps=1e-15,
            update_interval=interval,
            bias_correction=False,
            nu_dtype=jnp.dtype("float64"),
            **shared,
        )

        def hessian_fn_at(params: Any, t: Any) -> Any:
            def hessian_fn(key: jax.Array) -> jax.Array:
                estimate = batch * sampled_grads(jnp, params, t - 1) ** 2
                return jnp.where(t == 0, 0.0, estimate)

            return hessian_fn

        actual = trajectory(
            tx, lambda params, t: residuals(jnp, params, labels), hessian_fn_at, start, steps
        )
    np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-13)


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


# Dtypes


def test_nu_is_float32_whatever_the_params_are_and_so_it_moves() -> None:
    """After 300 refreshes of 1 with b2 = 0.99, h is 0.951; a bfloat16 average gets stuck."""
    reached = {}
    for nu_dtype in (jnp.dtype("float32"), None):
        tx = sophia_optax.scale_by_sophia(update_interval=1, nu_dtype=nu_dtype)
        params = jnp.ones(3, jnp.bfloat16)

        def body(state: Any, _: Any, tx: Any = tx, params: Any = params) -> Any:
            return tx.update(params, state, params, hessian_fn=constant(params))[1], None

        state = jax.jit(lambda s, body=body: jax.lax.scan(body, s, length=300)[0])(tx.init(params))
        assert state.mu.dtype == jnp.bfloat16
        reached[nu_dtype] = state.nu
    assert reached[jnp.dtype("float32")].dtype == jnp.float32
    np.testing.assert_allclose(reached[jnp.dtype("float32")], 1 - 0.99**300, rtol=1e-4)
    assert reached[None].dtype == jnp.bfloat16
    assert np.max(np.asarray(reached[None], np.float32)) < 0.9


def test_default_nu_of_bfloat16_params_is_float32() -> None:
    state = sophia_optax.scale_by_sophia().init(optax.tree.cast(PARAMS, jnp.bfloat16))
    chex.assert_trees_all_equal_dtypes(state.nu, PARAMS)
    assert state.mu["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("mu_dtype", (None, "float32", jnp.bfloat16, jnp.dtype("float16")))
@pytest.mark.parametrize("nu_dtype", (None, jnp.dtype("bfloat16"), jnp.dtype("float32")))
def test_moments_have_the_dtypes_asked_for(mu_dtype: Any, nu_dtype: Any) -> None:
    params = {"half": jnp.ones(2, jnp.bfloat16), "single": jnp.ones(3)}
    tx = sophia_optax.scale_by_sophia(mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    init = tx.init(params)
    updates, state = jitted_update(tx, constant(params))(params, init, params)
    for one in (init, state):
        for name, param in params.items():
            assert one.mu[name].dtype == (mu_dtype or param.dtype)
            assert one.nu[name].dtype == (nu_dtype or param.dtype)
    chex.assert_trees_all_equal_dtypes(updates, params)


@pytest.mark.parametrize(
    "tx",
    (
        sophia_optax.scale_by_sophia(),
        sophia_optax.sophia_h(optax.constant_schedule(1e-2), weight_decay=0.1),
    ),
    ids=("scale_by_sophia", "sophia_h"),
)
def test_updates_have_the_dtypes_of_the_gradients_not_of_the_params(tx: Any) -> None:
    """Through the weight decay too, which adds wider params to narrow gradients."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2, jnp.bfloat16), "c": jnp.ones((), jnp.float16)}
    grads = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2), "c": jnp.ones((), jnp.float16)}
    init = tx.init(params)
    updates, state = jitted_update(tx, constant(params))(grads, init, params)
    chex.assert_trees_all_equal_dtypes(updates, grads)
    chex.assert_trees_all_equal_dtypes(state, init)


def test_half_precision_moments_are_computed_in_float32() -> None:
    """The one rounding is that of the storage: mu is bfloat16(float32 formula)."""
    tx = sophia_optax.scale_by_sophia(b1=0.965)
    grads = jnp.asarray([1.0, 0.3, -7.0], jnp.bfloat16)
    _, state = jitted_update(tx, constant(grads))(grads, tx.init(grads), grads)
    expected = (np.float32(1 - 0.965) * np.asarray(grads, np.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(state.mu), expected)


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


# Leaves and trees of every kind


TREES: dict[str, Tree] = {
    "scalars": {"a": jnp.asarray(1.5), "b": jnp.asarray(-0.2)},
    "bare_array": jnp.ones((2, 3)),
    "zero_size": {"a": jnp.zeros((0, 3)), "b": jnp.ones(2)},
    "all_zero_size": jnp.zeros((0,)),
    "none": {"a": None, "b": jnp.ones(2), "c": [None, jnp.ones(3)]},
    "empty_dict": {},
    "empty_tuple": (),
    "nested_empty": {"a": {}, "b": [(), jnp.ones(2)]},
    "namedtuple": sophia_optax.SophiaDiagnostics(*(jnp.ones(i + 1) for i in range(5))),
}


@pytest.mark.parametrize("name", TREES)
def test_trees_that_adamw_takes_are_taken(name: str) -> None:
    """Same structure, shapes and dtypes out as optax.adamw gives, and a finite state."""
    params = TREES[name]
    grads = jax.tree.map(lambda x: 0.5 * x, params)
    adamw = optax.adamw(1e-2)
    expected, _ = jax.jit(adamw.update)(grads, adamw.init(params), params)
    tx = sophia_optax.sophia_h(1e-2)
    state = tx.init(params)
    update = jitted_update(tx, constant(jax.tree.map(jnp.ones_like, params)))
    for _ in range(2):
        updates, state = update(grads, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, expected)
    assert sophia_state(state).refreshes == 1
    chex.assert_tree_all_finite(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(optax.apply_updates(params, updates), params)


@pytest.mark.parametrize(
    "leaf",
    (jnp.arange(3), jnp.array([True, False]), jnp.asarray(5, jnp.uint8)),
    ids=("int32", "bool", "uint8"),
)
def test_integer_leaves_are_never_moved(leaf: jax.Array) -> None:
    """Not by the step, not by the weight decay, and whatever dtype their gradient comes in."""
    params = {"w": jnp.ones(2), "n": leaf}
    float0_grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params)
    tx = sophia_optax.sophia_h(1.0, weight_decay=0.5)
    for grads in (float0_grads, {"w": params["w"], "n": jnp.ones_like(leaf)}):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(
                grads, state, params, hessian_fn=constant(params), refresh=True
            )
        moved = optax.apply_updates(params, updates)
        chex.assert_trees_all_equal(moved["n"], leaf)
        assert jnp.all(moved["w"] < params["w"])
        for moment in (sophia_state(state).mu, sophia_state(state).nu):
            assert not np.any(np.asarray(moment["n"]))


def test_hutchinson_drives_a_tree_with_integers_and_empty_leaves() -> None:
    params = {"w": jnp.array([1.0, -2.0]), "n": jnp.arange(3), "empty": jnp.zeros((0, 2))}

    def loss(params: Tree) -> jax.Array:
        return jnp.sum(jnp.asarray([1.0, 5.0]) * params["w"] ** 2) + 0 * jnp.sum(params["n"])

    grads = jax.grad(loss, allow_int=True)(params)
    grads["n"] = jnp.zeros(3, jnp.int32)
    tx = sophia_optax.scale_by_sophia(b2=0.0)
    hessian_fn = sophia_optax.hutchinson(loss, params)
    _, state = jitted_update(tx, hessian_fn)(grads, tx.init(params), params)
    np.testing.assert_allclose(state.nu["w"], [2.0, 10.0], rtol=1e-6)
    assert state.rejected == 0


# Seeds and resuming


def test_probes_depend_on_seed_and_count_and_on_nothing_else() -> None:
    def draws(seed: int) -> np.ndarray:
        tx = sophia_optax.scale_by_sophia(b2=0.0, update_interval=2, seed=seed)
        zeros = jnp.zeros(2, jnp.float32)
        update = jitted_update(tx, lambda key: jax.random.uniform(key, (2,)))
        state, seen = tx.init(zeros), []
        for _ in range(4):
            _, state = update(zeros, state, zeros)
            _, state = update(zeros, state, zeros)
            seen.append(np.asarray(state.nu))
        return np.stack(seen)

    first = draws(0)
    keys = [jax.random.fold_in(jax.random.key(0), count) for count in (0, 2, 4, 6)]
    expected = np.stack([jax.random.uniform(key, (2,)) for key in keys])
    np.testing.assert_allclose(first, expected, rtol=1e-6)
    assert len({*map(tuple, first), *map(tuple, draws(1))}) == 8


def _through_flax(state: Any, target: Any, path: Path) -> Any:
    return flax.serialization.from_bytes(target, flax.serialization.to_bytes(state))


def _through_orbax(state: Any, target: Any, path: Path) -> Any:
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "checkpoint", jax.eval_shape(lambda: target))


def _through_pickle(state: Any, target: Any, path: Path) -> Any:
    return pickle.loads(pickle.dumps(jax.tree.map(np.asarray, state)))


@functools.cache
def _resumable() -> Any:
    """A fresh training state, and a compiled step with a schedule, a refresh in three, probes."""
    problem = problems.REGRESSION
    tx = sophia_optax.sophia_h(optax.linear_schedule(1e-2, 1e-3, 10), update_interval=3)

    @jax.jit
    def step(params: Tree, state: Any) -> Any:
        grads = jax.grad(problem.loss)(params)
        hessian_fn = sophia_optax.hutchinson(problem.loss, params)
        updates, state = tx.update(grads, state, params, hessian_fn=hessian_fn)
        return optax.apply_updates(params, updates), state

    def run(carry: Any, steps: int) -> Any:
        for _ in range(steps):
            carry = step(*carry)
        return carry

    params = problem.init(jnp.float32)
    return (params, tx.init(params)), run


@pytest.mark.parametrize("through", (_through_flax, _through_orbax, _through_pickle))
def test_a_resumed_run_is_an_uninterrupted_one(through: Any, tmp_path: Path) -> None:
    fresh, run = _resumable()
    saved = run(fresh, 4)
    restored = through(saved, fresh, tmp_path)
    chex.assert_trees_all_equal(restored, saved)
    chex.assert_trees_all_equal(run(restored, 4), run(fresh, 8))


def test_the_state_can_be_cast_and_holds_arrays_alone() -> None:
    tx = sophia_optax.sophia_h(1e-2)
    _, state = jitted_update(tx, constant(HESSIAN))(GRADS, tx.init(PARAMS), PARAMS)
    half = sophia_state(optax.tree.cast(state, jnp.bfloat16))
    chex.assert_trees_all_equal(half.nu, optax.tree.cast(sophia_state(state).nu, jnp.bfloat16))
    for leaf in jax.tree.leaves(state):
        assert isinstance(leaf, jax.Array)
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def test_the_state_has_the_promised_fields() -> None:
    state = sophia_optax.scale_by_sophia().init(PARAMS)
    assert state._fields == ("count", "mu", "nu", "refreshes", "rejected", "win_rate", "gamma")
    for name in ("count", "refreshes", "rejected"):
        assert getattr(state, name).dtype == jnp.int32
    assert state.win_rate.dtype == state.gamma.dtype == jnp.float32
    chex.assert_trees_all_equal(state.mu, jax.tree.map(jnp.zeros_like, PARAMS))
    chex.assert_trees_all_equal(state.nu, jax.tree.map(jnp.zeros_like, PARAMS))


def test_numbers_that_are_not_python_floats_are_checked_only_when_they_are_known() -> None:
    """A tracer passes: its value is not there to be looked at, and looking would cost a sync."""

    @jax.jit
    def nu_after_a_step(b2: jax.Array) -> jax.Array:
        tx = sophia_optax.scale_by_sophia(b2=b2)
        hessian_fn = constant(HESSIAN)
        return tx.update(GRADS, tx.init(PARAMS), PARAMS, hessian_fn=hessian_fn)[1].nu["w"]

    np.testing.assert_allclose(nu_after_a_step(jnp.asarray(0.5)), 0.5 * HESSIAN["w"], rtol=1e-6)


def test_numpy_numbers_are_accepted() -> None:
    """As sweeps make them: np.geomspace(...), np.asarray(...)."""
    tx = sophia_optax.scale_by_sophia(
        np.float32(0.0),
        np.float64(0.0),
        np.asarray(1e-12),
        np.geomspace(0.1, 1.0, 2)[0],
        np.float32(1.0),
        np.int64(2),
        seed=np.int32(1),
    )
    plain = sophia_optax.scale_by_sophia(0.0, 0.0, 1e-12, 0.1, 1.0, 2, seed=1)
    one, other = (
        jitted_update(one, numbered(HESSIAN))(GRADS, one.init(PARAMS), PARAMS)
        for one in (tx, plain)
    )
    chex.assert_trees_all_close(one, other, rtol=1e-6)


# Errors: the fact with the offending value or tree path, then a remedy


@pytest.mark.parametrize("name", ["mu_dtype", "nu_dtype"])
def test_a_dtype_that_holds_no_average_is_refused_at_construction(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name} is 'int32'.*floating point"):
        sophia_optax.scale_by_sophia(**{name: "int32"})


BAD_NUMBERS = [
    ("b1", -0.1),
    ("b1", 1.0),
    ("b1", math.nan),
    ("b1", np.float32(1.5)),
    ("b2", 1),
    ("b2", -1e-3),
    ("b2", math.inf),
    ("eps", 0.0),
    ("eps", -1e-8),
    ("eps", math.inf),
    ("gamma", 0.0),
    ("gamma", -0.01),
    ("gamma", math.nan),
    ("clip_threshold", 0.0),
    ("clip_threshold", -1.0),
    ("clip_threshold", math.nan),
    ("update_interval", 0),
    ("update_interval", -3),
    ("update_interval", 2.5),
    ("update_interval", math.nan),
]


@pytest.fixture
def own_checks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the run-time type checks of the tests, which would speak before the library does."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def assert_helpful(message: str, *facts: str) -> None:
    """Every fact is in the message, which has more than one sentence (the second: a remedy)."""
    for fact in facts:
        assert fact in message, f"{fact!r} is not in {message!r}"
    sentences = re.split(r"[.;:]\s+", message.strip())
    assert len(sentences) > 1, message


@pytest.mark.parametrize("factory", ("scale_by_sophia", "sophia_h", "sophia_g"))
@pytest.mark.parametrize(("name", "value"), BAD_NUMBERS)
def test_a_number_out_of_range_is_refused_at_construction(
    factory: str, name: str, value: Any
) -> None:
    args = () if factory == "scale_by_sophia" else (1e-2,)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        getattr(sophia_optax, factory)(*args, **{name: value})
    assert_helpful(str(error.value), name, str(value))


@pytest.mark.parametrize("alias", ("sophia_h", "sophia_g"))
@pytest.mark.parametrize("value", (-0.1, math.nan))
def test_a_negative_weight_decay_is_refused(alias: str, value: float) -> None:
    with pytest.raises(ValueError, match="weight_decay") as error:
        getattr(sophia_optax, alias)(1e-2, weight_decay=value)
    assert_helpful(str(error.value), str(value))


@pytest.mark.usefixtures("own_checks_alone")
@pytest.mark.parametrize(
    "name", ("b1", "b2", "eps", "gamma", "clip_threshold", "update_interval", "weight_decay")
)
def test_a_schedule_goes_through_inject_hyperparams(name: str) -> None:
    with pytest.raises(TypeError) as error:
        sophia_optax.sophia_h(1e-2, **{name: optax.constant_schedule(0.5)})
    assert_helpful(str(error.value), name, "optax.inject_hyperparams")


BAD_ESTIMATES: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "wrong_shape": ({"w": jnp.ones(4), "b": HESSIAN["b"]}, ValueError, ("w", "(4,)", "(2, 2)")),
    "scalar": ({"w": HESSIAN["w"], "b": jnp.ones(())}, ValueError, ("b", "()", "(3,)")),
    "missing_leaf": ({"w": HESSIAN["w"]}, ValueError, ("b",)),
    "extra_leaf": ({**HESSIAN, "zzz": jnp.ones(2)}, ValueError, ("zzz",)),
    "wrong_container": ([HESSIAN["w"], HESSIAN["b"]], ValueError, ()),
    "none": (None, ValueError, ()),
    "complex": ({"w": HESSIAN["w"] * 1j, "b": HESSIAN["b"]}, TypeError, ("w", "complex64")),
}


@pytest.mark.parametrize("name", BAD_ESTIMATES)
@pytest.mark.parametrize("refresh", (None, True))
def test_an_estimate_that_does_not_fit_is_refused_with_its_path(
    name: str, refresh: bool | None
) -> None:
    estimate, exception, facts = BAD_ESTIMATES[name]
    tx = sophia_optax.sophia_h(1e-2)
    with pytest.raises(exception) as error:
        tx.update(GRADS, tx.init(PARAMS), PARAMS, hessian_fn=constant(estimate), refresh=refresh)
    assert_helpful(str(error.value), *facts)


def test_the_path_in_an_error_is_that_of_the_nested_leaf() -> None:
    params = {"block": [{"kernel": jnp.ones((2, 3))}, {"kernel": jnp.ones((3, 2))}]}
    estimate = {"block": [{"kernel": jnp.ones((2, 3))}, {"kernel": jnp.ones((2, 3))}]}
    tx = sophia_optax.scale_by_sophia()
    with pytest.raises(ValueError, match=re.escape("['block'][1]['kernel']")) as error:
        tx.update(params, tx.init(params), params, hessian_fn=constant(estimate))
    assert_helpful(str(error.value), "(2, 3)", "(3, 2)")


def test_a_missing_estimator_is_named_with_the_remedy() -> None:
    tx = sophia_optax.scale_by_sophia()
    with pytest.raises(ValueError, match="hessian_fn") as error:
        tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert_helpful(str(error.value), "hutchinson")


@pytest.mark.usefixtures("own_checks_alone")
def test_an_estimate_in_place_of_an_estimator_is_refused() -> None:
    tx = sophia_optax.scale_by_sophia()
    with pytest.raises(TypeError, match="hessian_fn"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, hessian_fn=HESSIAN)


@pytest.mark.usefixtures("own_checks_alone")
def test_a_traced_refresh_is_refused() -> None:
    tx = sophia_optax.scale_by_sophia()
    state = tx.init(PARAMS)

    def update(refresh: jax.Array) -> Any:
        return tx.update(GRADS, state, PARAMS, hessian_fn=constant(HESSIAN), refresh=refresh)

    with pytest.raises((TypeError, ValueError), match="refresh") as error:
        jax.jit(update)(jnp.asarray(True))
    assert type(error.value) in {TypeError, ValueError}, "JAX's own error, not the library's"


def test_complex_leaves_are_refused_with_their_path() -> None:
    params = {"real": jnp.ones(2), "z": jnp.ones(2, jnp.complex64)}
    tx = sophia_optax.scale_by_sophia()
    with pytest.raises(TypeError, match="z") as error:
        tx.update(params, tx.init(params), params, hessian_fn=constant(params))
    assert_helpful(str(error.value), "['z']", "complex64")


def test_flatten_is_named_in_the_error() -> None:
    tx = optax.flatten(sophia_optax.scale_by_sophia())
    with pytest.raises(ValueError, match=r"optax\.flatten") as error:
        tx.update(GRADS, tx.init(PARAMS), PARAMS, hessian_fn=constant(HESSIAN))
    assert_helpful(str(error.value))


@pytest.mark.parametrize("every_k", (0, -1))
def test_on_emit_refuses_an_interval_that_cannot_be(every_k: int) -> None:
    multi = optax.MultiSteps(sophia_optax.sophia_h(1e-2), 2)
    with pytest.raises(ValueError, match="every_k") as error:
        sophia_optax.on_emit(constant(HESSIAN), multi.init(PARAMS), every_k)
    assert_helpful(str(error.value), str(every_k))


@pytest.mark.usefixtures("own_checks_alone")
def test_on_emit_refuses_a_state_that_is_not_of_multi_steps() -> None:
    state = sophia_optax.sophia_h(1e-2).init(PARAMS)
    with pytest.raises((TypeError, ValueError), match="MultiSteps"):
        sophia_optax.on_emit(constant(HESSIAN), state, 2)
