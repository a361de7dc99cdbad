"""The state: its fields and dtypes, and that a resumed run is an uninterrupted one."""

import functools
import pickle
from pathlib import Path
from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

import sophia_optax
from tests import problems
from tests.transforms import GRADS, HESSIAN, PARAMS, constant, jitted_update, numbered, sophia_state

Tree = Any


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


SCALE = sophia_optax.scale_by_sophia()


@pytest.mark.parametrize(
    "tx",
    (
        SCALE,
        sophia_optax.sophia_h(optax.constant_schedule(1e-2), weight_decay=0.1),
    ),
    ids=("scale_by_sophia", "sophia_h"),
)
def test_updates_have_the_wider_dtype_of_gradient_and_parameter(tx: Any) -> None:
    """Through the weight decay too, which adds wider params to narrow gradients."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2, jnp.bfloat16), "c": jnp.ones((), jnp.float16)}
    grads = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2), "c": jnp.ones((), jnp.float16)}
    init = tx.init(params)
    updates, state = jitted_update(tx, constant(params))(grads, init, params)
    wide = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones((), jnp.float16)}
    chex.assert_trees_all_equal_dtypes(updates, wide)
    chex.assert_trees_all_equal_dtypes(state, init)
    if tx is SCALE:
        updates, _ = jitted_update(tx, constant(params))(grads, init, None)
        chex.assert_trees_all_equal_dtypes(updates, grads)


@pytest.mark.parametrize("rate", (3e-4, 1e-3))
def test_bfloat16_gradients_do_not_round_the_weight_decay_of_float32_params(rate: float) -> None:
    """A clipped step and its decay, added in bfloat16, would be the step alone."""
    params = 0.02 * jax.random.normal(jax.random.key(0), (1000,))
    signs = jax.random.rademacher(jax.random.key(1), params.shape, jnp.bfloat16)

    def moved(weight_decay: float) -> Any:
        tx = sophia_optax.sophia_g(rate, weight_decay=weight_decay)
        update = jitted_update(tx, constant(jnp.zeros(params.shape)))
        return np.asarray(update(signs, tx.init(params), params)[0], np.float64)

    expected = -rate * 0.1 * np.asarray(params, np.float64)
    np.testing.assert_allclose(moved(0.1) - moved(0.0), expected, atol=1e-6 * rate)


def test_half_precision_moments_are_computed_in_float32() -> None:
    """The one rounding is that of the storage: mu is bfloat16(float32 formula)."""
    tx = sophia_optax.scale_by_sophia(b1=0.965)
    grads = jnp.asarray([1.0, 0.3, -7.0], jnp.bfloat16)
    _, state = jitted_update(tx, constant(grads))(grads, tx.init(grads), grads)
    expected = (np.float32(1 - 0.965) * np.asarray(grads, np.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(state.mu), expected)


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


@pytest.mark.parametrize("clip_threshold", (1.0, 0.3))
def test_an_infinite_gradient_shows_as_nan_as_it_does_with_adamw(clip_threshold: float) -> None:
    """Clipped, it would be one full step after the other, in one direction for good."""
    params, bad = jnp.ones(3), jnp.array([1.0, -jnp.inf, 1.0])
    for tx in (sophia_optax.sophia_g(0.1, clip_threshold=clip_threshold), optax.adamw(0.1)):
        state = tx.init(params)
        update = jitted_update(optax.with_extra_args_support(tx), constant(jnp.ones(3)))
        for grads in (bad, params, params):
            updates, state = update(grads, state, params)
            np.testing.assert_array_equal(jnp.isnan(updates), [False, True, False])


def test_apply_if_finite_saves_a_run_from_an_infinite_gradient() -> None:
    params, bad = jnp.ones(3), jnp.array([1.0, -jnp.inf, 1.0])
    tx = optax.apply_if_finite(sophia_optax.sophia_g(0.1), max_consecutive_errors=3)
    update = jitted_update(tx, constant(jnp.ones(3)))
    state = update(params, tx.init(params), params)[1]
    updates, after = update(bad, state, params)
    np.testing.assert_array_equal(updates, 0)
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    assert np.all(update(params, after, params)[0] < 0)
