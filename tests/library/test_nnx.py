"""The Flax NNX adapter: models with random streams and statistics inside a curvature loss."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

pytest.importorskip("flax.nnx", reason="the NNX adapter needs Flax")

from flax import nnx

import sophia_optax.nnx

_rng = np.random.default_rng(0)
INPUTS = jnp.asarray(_rng.normal(size=(32, 4)), jnp.float32)
LABELS = jnp.asarray(np.argmax(INPUTS[:, :3], axis=-1))


class Classifier(nnx.Module):
    """A small network with every kind of state that is not a parameter."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.dropout(jnp.tanh(self.norm(self.hidden(x)))))


def loss_fn(model: nnx.Module, x: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(x), labels))


def forward(model: nnx.Module, x: jax.Array) -> jax.Array:
    return model(x)


def estimator(name: str, model: nnx.Module, **kwargs: Any) -> sophia_optax.HessianFn:
    if name == "hutchinson":
        return sophia_optax.hutchinson(
            *sophia_optax.nnx.functional_loss(model, loss_fn, INPUTS, LABELS, **kwargs)
        )
    return sophia_optax.gauss_newton_bartlett(
        *sophia_optax.nnx.functional_outputs(model, forward, INPUTS, **kwargs)
    )


# Tests that step a model of one kind with one of these share a program.
OF_CLASSIFIER = sophia_optax.sophia_h(2e-2, b1=0.9, update_interval=3)
OF_LINEAR = sophia_optax.sophia_g(1e-2, update_interval=2)


@functools.partial(nnx.jit, static_argnames="name")
def step(model: nnx.Module, optimizer: nnx.Optimizer, name: str) -> jax.Array:
    """A step on the data, and the loss before it."""
    loss, grads = nnx.value_and_grad(loss_fn)(model, INPUTS, LABELS)
    optimizer.update(model, grads, hessian_fn=estimator(name, model))
    return loss


each_estimator = pytest.mark.parametrize("name", ("hutchinson", "gauss_newton_bartlett"))


@each_estimator
def test_dropout_and_batch_norm_train_through_nnx_optimizer(name: str) -> None:
    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, OF_CLASSIFIER, wrt=nnx.Param)
    losses = [float(step(model, optimizer, name)) for _ in range(40)]
    found = sophia_optax.diagnostics(optimizer.opt_state)
    assert (int(found.count[...]), int(found.refreshes[...])) == (40, 14)
    assert int(found.rejected[...]) == 0
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    assert not np.array_equal(model.norm.mean[...], np.zeros(8))


def test_diagnostics_of_an_nnx_optimizer_are_arrays_that_format() -> None:
    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, OF_CLASSIFIER, wrt=nnx.Param)
    step(model, optimizer, "gauss_newton_bartlett")
    found = sophia_optax.diagnostics(optimizer.opt_state)
    assert all(isinstance(value, jax.Array) for value in found)
    assert f"{found.count:d} {found.refreshes:d} {found.win_rate:.2f}".startswith("1 1 0.")


@each_estimator
def test_an_estimate_leaves_the_model_as_it_was(name: str) -> None:
    """Batch statistics and the counts of random streams are changed in a copy alone."""
    model = Classifier(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey))))
    estimate = jax.jit(estimator(name, model))(jax.random.key(0))
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey))))
    chex.assert_trees_all_equal(before, after)
    chex.assert_tree_all_finite(estimate)


@each_estimator
def test_the_estimate_has_the_structure_that_nnx_optimizer_hands_to_optax(name: str) -> None:
    model = Classifier(nnx.Rngs(0))
    seen: list[Any] = []

    def look(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        estimate = jax.eval_shape(extra_args["hessian_fn"], jax.random.key(0))
        seen.append((updates, params, estimate))
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), look)
    optimizer = nnx.Optimizer(model, spy, wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer) -> None:
        grads = nnx.grad(loss_fn)(model, INPUTS, LABELS)
        optimizer.update(model, grads, hessian_fn=estimator(name, model))

    step(model, optimizer)
    ((updates, params, estimate),) = seen
    chex.assert_trees_all_equal_structs(updates, params, estimate)
    chex.assert_trees_all_equal_shapes(updates, params, estimate)


def test_functional_loss_is_the_loss_and_its_params_are_the_models() -> None:
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    loss_of_params, params = sophia_optax.nnx.functional_loss(model, loss_fn, INPUTS, LABELS)
    np.testing.assert_array_equal(loss_of_params(params), loss_fn(model, INPUTS, LABELS))
    doubled = jax.tree.map(lambda p: 2 * p, params)
    model.kernel[...] = 2 * model.kernel[...]
    np.testing.assert_allclose(loss_of_params(doubled), loss_fn(model, INPUTS, LABELS), rtol=1e-6)


def test_functional_outputs_are_the_outputs() -> None:
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    outputs_of_params, params = sophia_optax.nnx.functional_outputs(model, forward, INPUTS)
    np.testing.assert_array_equal(outputs_of_params(params), model(INPUTS))


@each_estimator
def test_a_model_trains_as_its_params_do_in_plain_optax(name: str) -> None:
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(1))
    tx = OF_LINEAR
    start = {"bias": model.bias[...], "kernel": model.kernel[...]}

    def logits(params: Any) -> jax.Array:
        return INPUTS @ params["kernel"] + params["bias"]

    def loss(params: Any) -> jax.Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params), LABELS))

    @jax.jit
    def plain_step(params: Any, state: Any) -> Any:
        if name == "hutchinson":
            hessian_fn = sophia_optax.hutchinson(loss, params)
        else:
            hessian_fn = sophia_optax.gauss_newton_bartlett(logits, params)
        updates, state = tx.update(jax.grad(loss)(params), state, params, hessian_fn=hessian_fn)
        return optax.apply_updates(params, updates), state

    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params, state = start, tx.init(start)
    for _ in range(4):
        params, state = plain_step(params, state)
        step(model, optimizer, name)
    np.testing.assert_allclose(model.kernel[...], params["kernel"], rtol=1e-5)
    np.testing.assert_allclose(model.bias[...], params["bias"], rtol=1e-4, atol=1e-7)


@each_estimator
def test_wrt_chooses_the_params(name: str) -> None:
    """A part of the model is trained: the estimate has its leaves and nothing else moves."""
    model = Classifier(nnx.Rngs(0))
    wrt = nnx.All(nnx.Param, nnx.PathContains("head"))
    optimizer = nnx.Optimizer(model, sophia_optax.sophia_g(1e-2), wrt=wrt)
    hidden, head = np.asarray(model.hidden.kernel[...]), np.asarray(model.head.kernel[...])

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer) -> None:
        grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, wrt))(model, INPUTS, LABELS)
        optimizer.update(model, grads, hessian_fn=estimator(name, model, wrt=wrt))

    step(model, optimizer)
    np.testing.assert_array_equal(model.hidden.kernel[...], hidden)
    assert np.all(np.asarray(model.head.kernel[...]) != head)


@pytest.mark.parametrize("name, pure", [("hutchinson", False), ("gauss_newton_bartlett", True)])
def test_the_parts_of_a_split_model_train_as_the_model_does(name: str, pure: bool) -> None:
    """As a `State`, and as a dict of arrays."""
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(1))
    graphdef, params = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(params) if pure else params
    tx = OF_LINEAR

    def logits(params: Any) -> jax.Array:
        return nnx.merge(graphdef, params)(INPUTS)

    def loss(params: Any) -> jax.Array:
        return loss_fn(nnx.merge(graphdef, params), INPUTS, LABELS)

    @jax.jit
    def step_of_parts(params: Any, state: Any) -> Any:
        if name == "hutchinson":
            hessian_fn = sophia_optax.hutchinson(loss, params)
        else:
            hessian_fn = sophia_optax.gauss_newton_bartlett(logits, params)
        updates, state = tx.update(jax.grad(loss)(params), state, params, hessian_fn=hessian_fn)
        return optax.apply_updates(params, updates), state

    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    structure = jax.tree.structure(params)
    state = tx.init(params)
    for _ in range(3):
        params, state = step_of_parts(params, state)
        step(model, optimizer, name)
    assert jax.tree.structure(params) == structure
    trained = nnx.merge(graphdef, params)
    np.testing.assert_allclose(trained.kernel[...], model.kernel[...], rtol=1e-5)
    np.testing.assert_allclose(trained.bias[...], model.bias[...], rtol=1e-4, atol=1e-7)
    assert sophia_optax.diagnostics(state).refreshes == 2
