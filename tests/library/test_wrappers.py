"""Wrappers of Optax that drop keywords: an error that names them, and the remedy in its words."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax
from tests.transforms import GRADS, PARAMS, numbered, sophia_state

Tree = Any
HESSIAN_FN = numbered(jax.tree.map(jnp.ones_like, PARAMS))
TX = sophia_optax.sophia_h(1e-2, gamma=1.0)


def bound(tx: Any, hessian_fn: Any) -> optax.GradientTransformation:
    """The remedy of the error."""
    update = functools.partial(tx.update, hessian_fn=hessian_fn)
    return optax.GradientTransformation(tx.init, update)


def updated(tx: Any, params: Tree = PARAMS, **extra_args: Any) -> tuple[Tree, Any]:
    return jax.jit(lambda: tx.update(GRADS, tx.init(params), params, **extra_args))()


def fast(tx: Any) -> optax.GradientTransformation:
    """`optax.lookahead` on the fast params alone."""
    ahead = optax.lookahead(tx, sync_period=5, slow_step_size=0.5)
    pair = optax.LookaheadParams.init_synced

    def update(updates: Tree, state: Any, params: Tree = None) -> Any:
        moved, state = ahead.update(updates, state, pair(params))
        return moved.fast, state

    return optax.GradientTransformation(lambda params: ahead.init(pair(params)), update)


SAM = functools.partial(optax.contrib.sam, adv_optimizer=optax.sgd(0.1), sync_period=1)
DROPPING: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "chain of MultiSteps": (
        "MultiSteps",
        lambda tx: optax.chain(optax.identity(), optax.MultiSteps(tx, 1)),
    ),
    "apply_if_finite of MultiSteps": (
        "MultiSteps",
        lambda tx: optax.apply_if_finite(optax.MultiSteps(tx, 1), 3),
    ),
    "partition with MultiSteps": (
        "MultiSteps",
        lambda tx: optax.partition({"all": optax.MultiSteps(tx, 1)}, "all"),
    ),
    "masked MultiSteps": (
        "MultiSteps",
        lambda tx: optax.masked(optax.MultiSteps(tx, 1), True),
    ),
    "lookahead": ("optax.lookahead", fast),
    "split_real_and_imaginary": (
        "split_real_and_imaginary",
        optax.contrib.split_real_and_imaginary,
    ),
    "sam": ("optax.contrib.sam", SAM),
}


@pytest.mark.parametrize("name", DROPPING)
def test_a_wrapper_that_drops_hessian_fn_is_named_in_the_error(name: str) -> None:
    named, wrap = DROPPING[name]
    kwargs = {} if name == "sam" else {"hessian_fn": HESSIAN_FN}  # which refuses what it drops
    with pytest.raises(ValueError, match=r"functools\.partial\(tx\.update") as error:
        updated(optax.with_extra_args_support(wrap(TX)), **kwargs)
    assert named in str(error.value)


@pytest.mark.parametrize("name", DROPPING)
def test_the_remedy_of_that_error_gives_the_numbers_of_the_optimizer_alone(name: str) -> None:
    wrapped, state = updated(DROPPING[name][1](bound(TX, HESSIAN_FN)))
    expected, expected_state = updated(TX, hessian_fn=HESSIAN_FN)
    chex.assert_trees_all_close(wrapped, expected, rtol=1e-6, atol=1e-7)  # SAM adds and subtracts
    chex.assert_trees_all_close(sophia_state(state), sophia_state(expected_state), rtol=1e-6)


def test_multi_steps_with_extra_args_passes_hessian_fn_on_in_a_chain() -> None:
    multi = optax.MultiSteps(TX, 1)
    passing = optax.GradientTransformationExtraArgs(multi.init, multi.update)
    wrapped, _ = updated(optax.chain(optax.identity(), passing), hessian_fn=HESSIAN_FN)
    chex.assert_trees_all_close(wrapped, updated(TX, hessian_fn=HESSIAN_FN)[0], rtol=1e-6)


def test_frozen_params_beside_trained_ones_keep_still_and_have_no_state() -> None:
    """As LoRA is trained: an optimizer for the small matrices, and zeros for the others."""
    tx = optax.partition(
        {"train": TX, "freeze": optax.set_to_zero()}, {"w": "freeze", "b": "train"}
    )
    updates, state = updated(tx, hessian_fn=HESSIAN_FN)
    expected, _ = updated(TX, hessian_fn=HESSIAN_FN)
    chex.assert_trees_all_equal(updates["w"], jnp.zeros_like(PARAMS["w"]))
    chex.assert_trees_all_close(updates["b"], expected["b"], rtol=1e-6)
    assert sophia_state(state).nu["w"] == optax.MaskedNode()


# Complex params, as pairs of real arrays

CENTER = jnp.array([1j, 2.0, 1 - 1j], jnp.complex64)
SCALES = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


def complex_loss(params: Tree) -> jax.Array:
    """Its diagonal is twice the scales: along the real parts, then along the imaginary ones."""
    z = params["z"] - CENTER
    squares = SCALES * jnp.square(jnp.stack([z.real, z.imag]))
    return jnp.sum(squares) + jnp.sum(params["x"] ** 2)


def joined(pairs: Tree) -> Tree:
    return jax.tree.map(
        lambda x: jax.lax.complex(*x) if isinstance(x, tuple) else x,
        pairs,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def complex_step(tx: Any, params: Tree, state: Any) -> tuple[Tree, Any]:
    def update(updates: Tree, state: Any, pairs: Tree = None) -> Any:
        hessian_fn = sophia_optax.hutchinson(lambda pairs: complex_loss(joined(pairs)), pairs)
        return tx.update(updates, state, pairs, hessian_fn=hessian_fn)

    split = optax.contrib.split_real_and_imaginary(optax.GradientTransformation(tx.init, update))
    grads = jax.tree.map(jnp.conj, jax.grad(complex_loss)(params))
    updates, state = split.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def test_complex_params_step_as_pairs_of_real_ones() -> None:
    tx = sophia_optax.sophia_h(0.1, b1=0.5, gamma=0.5, update_interval=1)
    complexes = {"z": jnp.zeros(3, jnp.complex64), "x": jnp.ones(2)}
    reals = {"z": (jnp.zeros(3), jnp.zeros(3)), "x": jnp.ones(2)}

    def real_loss(pairs: Tree) -> jax.Array:
        return complex_loss(joined(pairs))

    @jax.jit
    def real_step(params: Tree, state: Any) -> tuple[Tree, Any]:
        hessian_fn = sophia_optax.hutchinson(real_loss, params)
        updates, state = tx.update(
            jax.grad(real_loss)(params), state, params, hessian_fn=hessian_fn
        )
        return optax.apply_updates(params, updates), state

    step = jax.jit(functools.partial(complex_step, tx))
    state = optax.contrib.split_real_and_imaginary(tx).init(complexes)
    real_state = tx.init(reals)
    for _ in range(30):
        complexes, state = step(complexes, state)
        reals, real_state = real_step(reals, real_state)
    chex.assert_trees_all_close(complexes, joined(reals), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(complexes["z"], CENTER, atol=0.2)
    nu = jnp.stack(sophia_state(state).nu["z"]) / (1 - 0.99**30)
    np.testing.assert_allclose(nu, 2 * SCALES, rtol=1e-4)


def test_an_estimator_of_complex_params_names_the_wrapper_that_splits_them() -> None:
    with pytest.raises(TypeError, match=r"\['z'\].*split_real_and_imaginary.*pairs"):
        sophia_optax.hutchinson(complex_loss, {"z": CENTER, "x": jnp.ones(2)})(jax.random.key(0))


def test_an_average_of_the_updates_is_one_of_those_of_the_optimizer_alone() -> None:
    averaged = optax.chain(TX, optax.ema(0.75, debias=False))
    step, step_alone = (
        jax.jit(functools.partial(tx.update, hessian_fn=HESSIAN_FN)) for tx in (averaged, TX)
    )
    state, state_alone = averaged.init(PARAMS), TX.init(PARAMS)
    expected = jax.tree.map(jnp.zeros_like, PARAMS)
    for _ in range(3):
        updates, state = step(GRADS, state, PARAMS)
        alone, state_alone = step_alone(GRADS, state_alone, PARAMS)
        expected = jax.tree.map(lambda e, u: 0.75 * e + 0.25 * u, expected, alone)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    assert sophia_optax.diagnostics(state) == sophia_optax.diagnostics(state_alone)
