"""What `benchmarks.estimator_quality` computes: exact diagonals, averages, errors and kinds."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import sophia_optax
from benchmarks import estimator_quality as quality
from examples.lm.config import MODELS
from examples.lm.model import Transformer
from tests import oracles

EXAMPLES, INPUTS, HIDDEN, CLASSES = 4, 3, 2, 5


def outputs(params, inputs):
    return jnp.tanh(inputs @ params["in"]) @ params["out"]


def problem():
    """A network with 16 params, and four examples whose labels are not the likely ones."""
    rng = np.random.default_rng(0)
    params = {
        "in": jnp.asarray(rng.normal(size=(INPUTS, HIDDEN)), jnp.float32),
        "out": jnp.asarray(rng.normal(size=(HIDDEN, CLASSES)), jnp.float32),
    }
    inputs = jnp.asarray(rng.normal(size=(EXAMPLES, INPUTS)), jnp.float32)
    return params, inputs, jnp.asarray([0, 4, 1, 1])


def loss(params, inputs, labels):
    logits = outputs(params, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def test_exact_diagonals_are_those_of_the_dense_matrices():
    params, inputs, labels = problem()
    found = quality.exact_diagonals(lambda p: outputs(p, inputs), labels, params)
    hessian = oracles.hessian_diagonal(lambda p: loss(p, inputs, labels), params)
    other = oracles.gauss_newton_diagonal(lambda p: outputs(p, inputs), params, "categorical")
    np.testing.assert_allclose(found["hessian"], oracles.ravel(hessian), atol=1e-6)
    np.testing.assert_allclose(found["gauss_newton"], oracles.ravel(other), atol=1e-6)
    assert np.abs(found["hessian"] - found["gauss_newton"]).max() > 1e-2


def test_a_mean_of_estimates_on_drawn_sub_batches_is_the_exact_diagonal_of_the_batch():
    params, inputs, labels = problem()
    vector, rebuild = ravel_pytree(params)
    batch = jnp.concatenate([inputs, labels[:, None]], axis=1)

    def hessian_fn(params, batch):
        inputs, labels = batch[:, :-1], batch[:, -1].astype(jnp.int32)
        return sophia_optax.hutchinson(lambda p: loss(p, inputs, labels), params)

    n = 2000
    keys = jax.random.split(jax.random.key(0), n)
    draw = quality.sampler(hessian_fn, rebuild, size=2)
    arguments = jnp.broadcast_to(batch, (n, *batch.shape)), jnp.broadcast_to(vector, (n, 16))
    estimates = np.asarray(draw(keys, *arguments))
    exact = quality.exact_diagonals(lambda p: outputs(p, inputs), labels, params)["hessian"]
    oracles.assert_unbiased(estimates, exact)
    oracles.assert_rejects_a_factor(estimates, exact, 0.5, 2.0)


def test_an_average_is_the_h_that_the_optimizer_holds():
    estimates = np.random.default_rng(0).normal(size=(2, 7, 5)).astype(np.float32)
    tx = sophia_optax.scale_by_sophia(update_interval=1)

    @jax.jit
    def refreshed(state, estimate):
        return tx.update(estimate, state, hessian_fn=lambda key: estimate, refresh=True)[1]

    state = tx.init(jnp.zeros(5))
    for count, estimate in enumerate(estimates[1], start=1):
        state = refreshed(state, estimate)
        held = state.nu / (1 - 0.99**count)
        found = quality.averages(estimates, count)[1]
        np.testing.assert_allclose(found, held, rtol=2e-5, atol=1e-6)


def test_verdicts_and_the_win_rate_are_those_of_the_optimizer():
    rng = np.random.default_rng(0)
    m = rng.normal(size=1000).astype(np.float32)
    h = rng.normal(0.5, 1.0, size=1000).astype(np.float32)
    gamma = quality.gamma_for(m, h, win_rate=0.25)
    assert quality.unclipped(m, h, gamma).mean() == 0.25
    assert not quality.unclipped(m, h, gamma)[h <= 0].any()
    tx = sophia_optax.scale_by_sophia(b1=0.0, gamma=gamma, absolute_curvature=False)
    _, state = tx.update(jnp.asarray(m), tx.init(jnp.zeros(1000)), hessian_fn=lambda key: h)
    assert sophia_optax.diagnostics(state).win_rate == pytest.approx(0.25, abs=2e-3)


def test_no_gamma_unclips_what_has_negative_curvature():
    with pytest.raises(ValueError, match="no γ unclips 50%"):
        quality.gamma_for(np.ones(4), np.array([1.0, -1.0, -1.0, -1.0]))


def test_errors_of_an_estimate_by_hand():
    exact, momentum = np.array([3.0, 4.0, 1.0, -1.0]), np.full(4, 2.0)
    same = quality.errors(exact, exact, momentum, gamma=1.0)
    assert same == {"relative": 0, "cosine": 1, "rank": 1, "flips": 0, "win_rate": 0.5}
    doubled = quality.errors(2 * exact, exact, momentum, gamma=1.1)  # 2 < 2.2: one more unclipped
    assert doubled == pytest.approx(same | {"relative": 1, "flips": 0.25, "win_rate": 0.75})
    turned = quality.errors(-exact, exact, momentum, gamma=1.0)
    assert turned == pytest.approx(
        {"relative": 2, "cosine": -1, "rank": -1, "flips": 0.5, "win_rate": 0}
    )


def test_every_coordinate_has_one_kind():
    config = replace(MODELS["tiny"], layers=2, width=8, context=4, heads=2, vocab_size=5)
    abstract = nnx.eval_shape(lambda: nnx.state(Transformer(config, nnx.Rngs(0)), nnx.Param))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape), abstract)
    counts = np.array([98_900, 1_000, 100, 1, 0])  # shares on either side of 1e-2 and of 1e-4
    found = quality.kinds(params, counts)
    assert found.size == oracles.ravel(params).size
    sizes = dict(zip(quality.KINDS, np.bincount(found, minlength=9), strict=True))
    assert sizes == {
        "embedding, frequent": 8, "embedding, common": 2 * 8, "embedding, rare": 2 * 8,
        "positions": 4 * 8, "attention q, k": 2 * 2 * 9 * 8, "attention v": 2 * 9 * 8,
        "attention out": 2 * 9 * 8, "MLP": 2 * (8 * 32 + 32 + 32 * 8 + 8),
        "norms": 2 * 2 * 2 * 8 + 2 * 8,
    }  # fmt: skip
    params["blocks"]["qkv"][...][:, :, 2] = 1.0
    values = oracles.ravel(params) == 1.0
    assert values.sum() == 2 * 8 * 8
    assert {quality.KINDS[kind] for kind in found[values]} == {"attention v"}


def test_a_parameter_of_no_kind_is_not_passed_over():
    with pytest.raises(ValueError, match=r"adapter.* is of no kind"):
        quality.kinds({"adapter": jnp.zeros(3)}, np.ones(5))
