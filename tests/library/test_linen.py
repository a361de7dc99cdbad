"""The Flax linen adapter: a TrainState whose optimizer gets its extra arguments."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

pytest.importorskip("flax.linen", reason="the linen adapter needs Flax")

import flax.serialization
from flax import linen
from flax.training import train_state

import sophia_optax.linen

_rng = np.random.default_rng(0)
INPUTS = jnp.asarray(_rng.normal(size=(32, 4)), jnp.float32)
LABELS = jnp.asarray(np.argmax(INPUTS[:, :3], axis=-1))
MODEL = linen.Dense(3)
PARAMS = jax.jit(MODEL.init)(jax.random.key(0), INPUTS)


def logits_fn(params: Any) -> jax.Array:
    return MODEL.apply(params, INPUTS)


def loss_fn(params: Any) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits_fn(params), LABELS))


def create(tx: Any, **kwargs: Any) -> sophia_optax.linen.TrainState:
    return sophia_optax.linen.TrainState.create(
        apply_fn=MODEL.apply, params=PARAMS, tx=tx, **kwargs
    )


SOPHIA = sophia_optax.sophia_g(1e-2)


@functools.partial(jax.jit, static_argnames="refresh")
def step_on_params(state: Any, refresh: bool = True) -> Any:
    """A step whose gradients and curvature are the params."""
    return state.apply_gradients(grads=PARAMS, hessian_fn=lambda key: PARAMS, refresh=refresh)


ESTIMATORS = {
    "hutchinson": lambda params: sophia_optax.hutchinson(loss_fn, params),
    "gauss_newton_bartlett": lambda params: sophia_optax.gauss_newton_bartlett(logits_fn, params),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_train_state_takes_the_steps_of_plain_optax(name: str) -> None:
    tx = sophia_optax.sophia_g(2e-2, update_interval=2)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state: Any) -> Any:
        grads = jax.grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads, hessian_fn=ESTIMATORS[name](state.params))

    @jax.jit
    def plain_step(params: Any, opt_state: Any) -> Any:
        grads = jax.grad(loss_fn)(params)
        updates, opt_state = tx.update(
            grads, opt_state, params, hessian_fn=ESTIMATORS[name](params)
        )
        return optax.apply_updates(params, updates), opt_state

    chex.clear_trace_counter()
    state, carry = create(tx), (PARAMS, tx.init(PARAMS))
    for _ in range(5):
        state, carry = step(state), plain_step(*carry)
    chex.assert_trees_all_close((state.params, state.opt_state), carry, rtol=1e-5, atol=1e-7)
    assert state.step == 5
    assert state.tx is tx
    assert sophia_optax.diagnostics(state.opt_state).refreshes == 3
    loss = jax.jit(loss_fn)
    assert loss(state.params) < loss(PARAMS)


@pytest.mark.parametrize("refresh", (True, False))
def test_refresh_reaches_the_optimizer(refresh: bool) -> None:
    state = step_on_params(create(SOPHIA), refresh)
    assert sophia_optax.diagnostics(state.opt_state).refreshes == int(refresh)


def test_it_is_flaxs_train_state_and_takes_optimizers_without_extra_arguments() -> None:
    state = create(optax.sgd(0.1))
    assert isinstance(state, train_state.TrainState)
    flaxs = train_state.TrainState.create(apply_fn=MODEL.apply, params=PARAMS, tx=optax.sgd(0.1))
    chex.assert_trees_all_equal(
        state.apply_gradients(grads=PARAMS).params, flaxs.apply_gradients(grads=PARAMS).params
    )


class StateWithStatistics(sophia_optax.linen.TrainState):
    """As users of BatchNorm extend Flax's own."""

    batch_stats: Any = None


class Normed(linen.Module):
    """A network with statistics and dropout."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.BatchNorm(use_running_average=False)(linen.Dense(8)(x))
        return linen.Dense(3)(linen.Dropout(0.2, deterministic=False)(jnp.tanh(x)))


def test_other_fields_are_replaced_as_in_flax() -> None:
    """BatchNorm and Dropout inside the curvature loss, statistics carried in a field."""
    model = Normed()
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.jit(model.init)(rngs, INPUTS)
    state = StateWithStatistics.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=sophia_optax.sophia_g(2e-2, b1=0.9, update_interval=3),
        batch_stats=variables["batch_stats"],
    )

    @jax.jit
    def step(state: Any) -> Any:
        def logits_and_stats(params: Any) -> Any:
            return state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                INPUTS,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(jax.random.key(2), state.step)},
            )

        def loss_and_stats(params: Any) -> Any:
            logits, changed = logits_and_stats(params)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
            return jnp.mean(losses), changed["batch_stats"]

        (loss, batch_stats), grads = jax.value_and_grad(loss_and_stats, has_aux=True)(state.params)
        hessian_fn = sophia_optax.gauss_newton_bartlett(
            lambda params: logits_and_stats(params)[0], state.params
        )
        return state.apply_gradients(
            grads=grads, hessian_fn=hessian_fn, batch_stats=batch_stats
        ), loss

    losses = []
    for _ in range(30):
        state, loss = step(state)
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.7 * losses[0]
    assert sophia_optax.diagnostics(state.opt_state).refreshes == 10
    changed = jax.tree.map(
        lambda a, b: bool(np.any(a != b)),
        *jax.device_get((state.batch_stats, variables["batch_stats"])),
    )
    assert all(jax.tree.leaves(changed))


def test_a_missing_estimator_is_the_transforms_own_error() -> None:
    with pytest.raises(ValueError, match="hessian_fn"):
        create(sophia_optax.sophia_h(1e-2)).apply_gradients(grads=PARAMS)


def test_the_train_state_can_be_saved_and_restored() -> None:
    fresh = create(SOPHIA)
    # The annotation of Flax's `step` allows no NumPy array, as which an array would be restored.
    state = step_on_params(fresh).replace(step=1)
    saved = flax.serialization.to_bytes(state)
    chex.assert_trees_all_equal(flax.serialization.from_bytes(fresh, saved), state)


def plain_update(tx: Any, **extra_args: Any) -> Any:
    grads = jax.grad(loss_fn)(PARAMS)
    updates, opt_state = tx.update(grads, tx.init(PARAMS), PARAMS, **extra_args)
    return optax.apply_updates(PARAMS, updates), opt_state


FORWARDED = {
    "obj_fn": (sophia_optax.sophia_h(1e-2), lambda: {"obj_fn": loss_fn}),
    "value": (
        optax.chain(optax.sgd(1e-2), optax.contrib.reduce_on_plateau(patience=1)),
        lambda: {"value": jnp.float32(2.0)},
    ),
    "value, grad and value_fn": (
        optax.lbfgs(),
        lambda: {"value": loss_fn(PARAMS), "grad": jax.grad(loss_fn)(PARAMS), "value_fn": loss_fn},
    ),
    "grad_fn": (
        optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), opaque_mode=True),
        lambda: {"grad_fn": lambda params, _: jax.grad(loss_fn)(params)},
    ),
    "hessian_fn under MultiSteps": (
        optax.MultiSteps(sophia_optax.sophia_g(1e-2), 1),
        lambda: {"hessian_fn": ESTIMATORS["gauss_newton_bartlett"](PARAMS)},
    ),
}


@pytest.mark.parametrize("name", FORWARDED)
def test_a_keyword_that_is_no_field_reaches_the_optimizer(name: str) -> None:
    tx, extra_args = FORWARDED[name]

    @jax.jit
    def both(state: Any) -> Any:
        stepped = state.apply_gradients(grads=jax.grad(loss_fn)(state.params), **extra_args())
        return (stepped.params, stepped.opt_state), plain_update(tx, **extra_args())

    found, expected = both(create(tx))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_keyword_that_nothing_takes_is_named() -> None:
    with pytest.raises(TypeError, match="batch_stats, which is neither a field of TrainState"):
        create(optax.scale(-0.1)).apply_gradients(grads=PARAMS, batch_stats={})


def test_an_optimizer_without_curvature_ignores_the_estimator() -> None:
    with_it = create(optax.adam(0.1)).apply_gradients(
        grads=PARAMS, hessian_fn=lambda key: PARAMS, refresh=True
    )
    without = create(optax.adam(0.1)).apply_gradients(grads=PARAMS)
    chex.assert_trees_all_equal(with_it.params, without.params)


@pytest.mark.filterwarnings("ignore")  # Flax's own, of its FP8 layers
@pytest.mark.parametrize("eigenbasis", (False, True))
def test_fp8_layers_step_alike_with_an_estimator_of_all_variables_and_of_params(
    eigenbasis: bool,
) -> None:
    """The scales of FP8 layers are overwritten with their gradients, and have no curvature."""
    model = linen.Dense(2, use_bias=False, dot_general_cls=linen.Fp8DirectDotGeneralOp)
    inputs = jnp.asarray(_rng.normal(size=(8, 4)), jnp.float32)
    tx = sophia_optax.sophia_g(1e-2, eigenbasis=eigenbasis)

    @jax.jit
    def fresh(key: jax.Array) -> Any:
        variables = model.init(key, inputs)
        return sophia_optax.linen.TrainState.create(apply_fn=model.apply, params=variables, tx=tx)

    state = fresh(jax.random.key(1))
    scales = {key: value for key, value in state.params.items() if key != "params"}
    assert scales

    def logits_of(variables: Any) -> jax.Array:
        return model.apply(variables, inputs).astype(jnp.float32)

    @jax.jit
    def both(state: Any) -> Any:
        grads = jax.grad(lambda variables: jnp.sum(logits_of(variables) ** 2))(state.params)
        of_all = sophia_optax.gauss_newton_bartlett(logits_of, state.params)
        of_params = sophia_optax.gauss_newton_bartlett(
            lambda params: logits_of({"params": params, **scales}), state.params["params"]
        )
        steps = [state.apply_gradients(grads=grads, hessian_fn=fn) for fn in (of_all, of_params)]
        return grads, *steps

    grads, of_all, of_params = both(state)
    chex.assert_trees_all_close(of_all, of_params, rtol=1e-5, atol=1e-7)
    assert sophia_optax.diagnostics(of_all.opt_state).refreshes == 1
    for key in scales:
        chex.assert_trees_all_equal(of_all.params[key], grads[key])


@pytest.mark.filterwarnings("ignore")  # Flax's own, of its FP8 layers
def test_an_estimator_of_all_fp8_variables_turns_the_params_alone_and_back_again() -> None:
    model = linen.Dense(2, use_bias=False, dot_general_cls=linen.Fp8DirectDotGeneralOp)
    tx = sophia_optax.sophia_g(1e-2, eigenbasis=True)
    variables = jax.jit(model.init)(jax.random.key(1), jnp.ones((8, 4)))

    @jax.jit
    def turned_and_back(variables: Any) -> Any:
        seen = []

        def hessian_fn(key: jax.Array, /, *, coordinates: Any) -> Any:
            turned = coordinates.turn(variables)
            seen.extend([turned, coordinates.back(turned)])
            return jax.tree.map(jnp.ones_like, variables)

        sophia_optax.linen.TrainState.create(
            apply_fn=model.apply, params=variables, tx=tx
        ).apply_gradients(grads=variables, hessian_fn=hessian_fn, refresh=True, refresh_basis=True)
        return seen

    turned, back = turned_and_back(variables)
    chex.assert_trees_all_close(back, variables, rtol=1e-5, atol=1e-6)
    kernel = variables["params"].pop("kernel")
    assert np.abs(turned["params"].pop("kernel") - kernel).max() > 0.1
    chex.assert_trees_all_equal(turned, variables)
