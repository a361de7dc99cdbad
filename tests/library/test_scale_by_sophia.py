"""The step of the transform: its formula, its trajectories, leaves of every kind."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax
from tests import oracles
from tests.transforms import GRADS, HESSIAN, PARAMS, constant, jitted_update, sophia_state

Tree = Any


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


def test_leaves_of_every_type_that_adamw_takes_give_the_numbers_of_arrays() -> None:
    """Python and NumPy numbers and weakly typed arrays, as gradients and as params."""
    numbers = {"float": 2.5, "scalar": np.float32(1.5), "array": np.ones(2, np.float32)}
    numbers |= {"weak": jnp.asarray(0.5), "whole": 3}
    arrays = jax.tree.map(lambda x: jnp.array(x, jnp.result_type(x)), numbers)
    tx = sophia_optax.sophia_g(1e-2, weight_decay=0.1)
    found = []
    for tree in (numbers, arrays):
        updates, state = tx.update(tree, tx.init(tree), tree, hessian_fn=constant(tree))
        _, state = tx.update(tree, state, tree, refresh=False)
        found.append((updates, state))
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    chex.assert_trees_all_equal(*found)


def test_a_state_of_weakly_typed_params_can_be_carried_through_a_scan() -> None:
    tx = sophia_optax.sophia_g(1e-2)
    params = {"w": jnp.asarray(2.0), "n": jnp.asarray(3)}

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        grads = {"w": params["w"], "n": jnp.zeros((), jnp.int32)}
        updates, state = tx.update(grads, state, params, hessian_fn=constant(grads))
        return (optax.apply_updates(params, updates), state), None

    (moved, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=3)
    assert moved["w"] < 2.0


def test_init_takes_prng_keys_and_update_leaves_them_be() -> None:
    params = {"w": jnp.ones(2), "key": jax.random.key(0)}
    grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params)
    tx = sophia_optax.scale_by_sophia()
    state = tx.init(params)
    updates, state = tx.update(grads, state, hessian_fn=constant({"w": jnp.ones(2), "key": 0}))
    assert np.all(updates["w"] > 0)
    for leaf in jax.tree.leaves(state):
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@pytest.mark.parametrize("keywords", [{}, {"gamma": 0.1}, {"eigenbasis": {"max_size": 10}}])
def test_a_model_of_more_than_2_to_the_31_parameters_is_traced(keywords: Any) -> None:
    params = {name: jax.ShapeDtypeStruct((100_000, 10_000), jnp.float32) for name in "abc"}
    tx = sophia_optax.sophia_g(1e-3, **keywords)
    state = jax.eval_shape(tx.init, params)
    updates, _ = jax.eval_shape(
        lambda g, s, p: tx.update(g, s, p, hessian_fn=lambda key, **_: g), params, state, params
    )
    assert updates == params
