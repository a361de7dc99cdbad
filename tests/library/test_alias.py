"""The aliases: the transform, decoupled weight decay, the learning rate, and `obj_fn`."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax
from tests import oracles, problems

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.1, -0.3, 0.7])}
GRADS = {"w": jnp.array([[0.3, -0.1], [2.0, -5.0]]), "b": jnp.array([1e-3, 0.0, -0.4])}
HESSIAN = {"w": jnp.array([[10.0, 200.0], [-3.0, 1e3]]), "b": jnp.array([0.0, 5.0, 60.0])}
ALIASES = (sophia_optax.sophia_h, sophia_optax.sophia_g)
each_alias = pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.__name__)


def updates_of(tx: Any, steps: int = 1, **kwargs: Any) -> Any:
    """The updates of the last of a few steps with constant gradients and curvature."""
    kwargs = kwargs or {"hessian_fn": lambda key: HESSIAN}

    update = jax.jit(lambda state: tx.update(GRADS, state, PARAMS, **kwargs))
    updates, state = None, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = update(state)
    return updates


@each_alias
def test_alias_is_the_chain_that_it_says(alias: Callable[..., Any]) -> None:
    keywords = {
        "b1": 0.8,
        "b2": 0.9,
        "eps": 1e-8,
        "gamma": 0.3,
        "clip_threshold": 0.5,
        "update_interval": 2,
        "bias_correction": False,
        "absolute_curvature": False,
        "mu_dtype": jnp.dtype("bfloat16"),
        "nu_dtype": None,
        "seed": 3,
    }
    whole = alias(1e-2, weight_decay=0.1, mask={"w": True, "b": False}, **keywords)
    parts = optax.chain(
        sophia_optax.scale_by_sophia(**keywords),
        optax.add_decayed_weights(0.1, {"w": True, "b": False}),
        optax.scale_by_learning_rate(1e-2),
    )

    def hessian_fn(key: jax.Array) -> Any:
        return jax.tree.map(lambda h: h * jax.random.uniform(key), HESSIAN)

    chex.assert_trees_all_equal(
        updates_of(whole, 4, hessian_fn=hessian_fn), updates_of(parts, 4, hessian_fn=hessian_fn)
    )
    chex.assert_trees_all_equal_structs(whole.init(PARAMS), parts.init(PARAMS))


@each_alias
def test_defaults_are_the_documented_ones(alias: Callable[..., Any]) -> None:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(alias).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    assert defaults == {
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-12,
        "gamma": 0.02
        if alias is sophia_optax.sophia_h
        else sophia_optax.win_rate_target(0.8, weighted=True),
        "clip_threshold": 1.0,
        "update_interval": 10,
        "weight_decay": 1e-4,
        "mask": None,
        "bias_correction": True,
        "absolute_curvature": True,
        "nesterov": None,
        "eigenbasis": False,
        "max_estimate_ratio": None,
        "mu_dtype": None,
        "nu_dtype": jnp.dtype("float32"),
        "seed": 0,
    }
    positional = [
        name
        for name, parameter in inspect.signature(alias).parameters.items()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    assert positional == ["learning_rate", *list(defaults)[:8]]


def test_the_transform_has_the_same_defaults() -> None:
    transform = inspect.signature(sophia_optax.scale_by_sophia).parameters
    alias = inspect.signature(sophia_optax.sophia_h).parameters
    own = {"learning_rate", "weight_decay", "mask", "eigenbasis"}
    assert set(alias) - set(transform) == own
    for name, parameter in transform.items():
        if name != "nesterov":  # which follows from the eigenbasis
            assert alias[name].default == parameter.default
        assert alias[name].kind == parameter.kind


def test_defaults_act_as_their_values() -> None:
    target = sophia_optax.win_rate_target(0.8, weighted=True)
    explicit = sophia_optax.sophia_g(1e-2, 0.9, 0.99, 1e-12, target, 1.0, 10, 1e-4, None)
    chex.assert_trees_all_equal(
        updates_of(explicit, 12), updates_of(sophia_optax.sophia_g(1e-2), 12)
    )
    h, g = updates_of(sophia_optax.sophia_h(1e-2)), updates_of(sophia_optax.sophia_g(1e-2))
    assert not np.array_equal(h["w"], g["w"])


@each_alias
def test_paper_has_the_papers_numbers_and_algorithm(alias: Callable[..., Any]) -> None:
    """Of section 3.1 of the paper, through clipped and free steps and curvature of both signs."""
    start, steps = np.array([1.0, -2.0, 0.5, 0.2]), 30
    scales = np.array([0.3, 4.0, 50.0, -1.0])
    gamma = 0.01 if alias is sophia_optax.sophia_h else 0.05

    def grads(params: Any, t: Any) -> Any:
        return gamma * scales * params

    def estimate(params: Any, t: Any) -> Any:
        return scales * (1 + t % 3)

    expected = oracles.sophia_trajectory(
        grads,
        estimate,
        start,
        steps=steps,
        learning_rate=0.05,
        b1=0.96,
        b2=0.99,
        eps=1e-12,
        gamma=gamma,
        clip_threshold=1.0,
        update_interval=10,
        weight_decay=0.2,
        bias_correction=False,
    )
    with jax.enable_x64(True):
        tx = alias(0.05, nu_dtype=jnp.dtype("float64"), **sophia_optax.PAPER[alias.__name__])
        params, state = jnp.asarray(start), tx.init(jnp.asarray(start))

        @jax.jit
        def step(params: Any, state: Any, t: Any) -> tuple[Any, Any]:
            updates, state = tx.update(
                grads(params, t), state, params, hessian_fn=lambda key: estimate(params, t)
            )
            return optax.apply_updates(params, updates), state

        found = []
        for t in range(steps):
            params, state = step(params, state, t)
            found.append(params)
    np.testing.assert_allclose(found, expected[1:], rtol=1e-12, atol=1e-13)


def test_paper_cannot_be_changed() -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        sophia_optax.PAPER["sophia_g"]["gamma"] = 1.0  # pyright: ignore[reportIndexIssue]


@each_alias
def test_weight_decay_is_decoupled_scaled_by_the_rate_and_not_clipped(
    alias: Callable[..., Any],
) -> None:
    """Moments do not see it: the updates differ by exactly -lr * weight_decay * params."""
    decayed = updates_of(alias(0.1, weight_decay=5.0), 3)
    plain = updates_of(alias(0.1, weight_decay=0.0), 3)
    expected = jax.tree.map(lambda u, p: u - 0.1 * 5.0 * p, plain, PARAMS)
    chex.assert_trees_all_close(decayed, expected, rtol=1e-6)


@each_alias
@pytest.mark.parametrize("kind", ("tree", "prefix", "callable"))
def test_mask_chooses_what_decays(alias: Callable[..., Any], kind: str) -> None:
    params = {"layer": PARAMS, "bias": jnp.ones(3)}
    mask: Any = {
        "tree": {"layer": {"w": True, "b": True}, "bias": False},
        "prefix": {"layer": True, "bias": False},
        "callable": lambda tree: {"layer": {"w": True, "b": True}, "bias": False},
    }[kind]
    tx = alias(1.0, weight_decay=0.5, mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda s: tx.update(zeros, s, params, hessian_fn=lambda key: params))(
        tx.init(params)
    )
    chex.assert_trees_all_close(updates["layer"], jax.tree.map(lambda p: -0.5 * p, PARAMS))
    chex.assert_trees_all_equal(updates["bias"], jnp.zeros(3))


def test_mask_callable_passes_through_inject_hyperparams_as_a_static_argument() -> None:
    def mask(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    injected = optax.inject_hyperparams(sophia_optax.sophia_h, static_args="mask")(
        1e-2, weight_decay=0.1, mask=mask
    )
    plain = sophia_optax.sophia_h(1e-2, weight_decay=0.1, mask=mask)
    chex.assert_trees_all_close(updates_of(injected), updates_of(plain), rtol=1e-5)


@each_alias
def test_update_points_downhill(alias: Callable[..., Any]) -> None:
    updates = updates_of(alias(0.1, weight_decay=0.0))
    for update, grad in zip(jax.tree.leaves(updates), jax.tree.leaves(GRADS), strict=True):
        np.testing.assert_array_equal(np.sign(update), -np.sign(grad))


@each_alias
def test_no_coordinate_moves_by_more_than_rate_times_clip(alias: Callable[..., Any]) -> None:
    updates = updates_of(alias(0.1, clip_threshold=0.25, weight_decay=0.0), 5)
    largest = max(float(jnp.max(jnp.abs(u))) for u in jax.tree.leaves(updates))
    assert largest == pytest.approx(0.025, rel=1e-6)


# obj_fn, the argument of optax.contrib.sophia


def test_obj_fn_is_a_hutchinson_probe_of_the_loss() -> None:
    problem = problems.ROSENBROCK
    params = problem.init(jnp.float32)
    grads = jax.jit(jax.grad(problem.loss))(params)
    tx = sophia_optax.sophia_h(1e-2)

    def first_update(**kwargs: Any) -> Any:
        return jax.jit(lambda: tx.update(grads, tx.init(params), params, **kwargs))()

    chex.assert_trees_all_equal(
        first_update(obj_fn=problem.loss),
        first_update(hessian_fn=sophia_optax.hutchinson(problem.loss, params)),
    )


def test_obj_fn_and_hessian_fn_together_are_refused() -> None:
    tx = sophia_optax.sophia_h(1e-2)
    with pytest.raises(ValueError, match=r"hessian_fn and obj_fn|obj_fn and hessian_fn"):
        tx.update(
            GRADS,
            tx.init(PARAMS),
            PARAMS,
            hessian_fn=lambda key: HESSIAN,
            obj_fn=lambda params: jnp.zeros(()),
        )


def test_obj_fn_on_masked_params_is_refused_with_the_way_out() -> None:
    tx = optax.masked(sophia_optax.sophia_h(1e-2), {"w": True, "b": False})
    with pytest.raises(ValueError, match="hessian_fn") as error:
        tx.update(GRADS, tx.init(PARAMS), PARAMS, obj_fn=lambda p: jnp.sum(p["b"]))
    assert "mask" in str(error.value)


def test_obj_fn_alone_is_no_estimator_for_sophia_g() -> None:
    tx = sophia_optax.sophia_g(1e-2)
    with pytest.raises(ValueError, match="hessian_fn"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, obj_fn=lambda params: jnp.zeros(()))


@each_alias
def test_missing_params_are_refused_with_the_remedy(alias: Callable[..., Any]) -> None:
    tx = alias(1e-2)
    with pytest.raises(ValueError, match=r"params.*\. \w+"):
        tx.update(GRADS, tx.init(PARAMS), hessian_fn=lambda key: HESSIAN)


@each_alias
@pytest.mark.parametrize("refresh", (True, False))
def test_refresh_reaches_the_transform(alias: Callable[..., Any], refresh: bool) -> None:
    tx = alias(1e-2)
    update = functools.partial(tx.update, hessian_fn=lambda key: HESSIAN, refresh=refresh)
    _, state = jax.jit(update)(GRADS, tx.init(PARAMS), PARAMS)
    assert sophia_optax.diagnostics(state).refreshes == int(refresh)


@each_alias
@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_a_learning_rate_that_is_not_finite_is_refused(
    alias: Callable[..., Any], value: float
) -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        alias(value)
