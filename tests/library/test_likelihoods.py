"""What the likelihoods draw: mean zero, and the covariance that a dense Hessian says."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import sophia_optax
from tests import networks, oracles

NAMES = ("categorical", "bernoulli", "gaussian")
SAMPLINGS = ("sample_residual", "sample_factor")
SHAPES = {"categorical": (2, 2, 3), "bernoulli": (2, 5), "gaussian": (2, 5)}


def outputs_of(name: str) -> np.ndarray:
    return 1.5 * np.random.default_rng(0).normal(size=SHAPES[name]).astype(np.float32)


@functools.cache
def compiled(name: str, sampling: str) -> Any:
    sample = getattr(getattr(sophia_optax, name), sampling)
    return oracles.jit(jax.vmap(sample, in_axes=(0, None)))


def draw(name: str, sampling: str, outputs: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """n independent draws, [n, ...]."""
    keys = jax.random.split(jax.random.key(seed), n)
    return np.asarray(compiled(name, sampling)(keys, jnp.asarray(outputs)))


def exact_covariance(name: str, outputs: np.ndarray) -> np.ndarray:
    """The Hessian of Σ -log p in all of the outputs at once: zero between two predictions."""
    targets = np.zeros(outputs.shape[:-1] if name == "categorical" else outputs.shape, np.int32)
    return oracles.hessian(lambda z: jnp.sum(networks.nll(name, z, targets)), outputs)


@pytest.mark.parametrize("name", NAMES)
def test_the_oracles_for_the_output_hessians_are_right(name):
    outputs = outputs_of(name)
    blocks = oracles.OUTPUT_HESSIANS[name](outputs).reshape(
        -1, *([outputs.shape[-1]] * 2 if name == "categorical" else [1, 1])
    )
    dense = exact_covariance(name, outputs)
    np.testing.assert_allclose(scipy.linalg.block_diag(*blocks), dense, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_draw_has_mean_zero_and_the_covariance_of_the_output_hessian(name, sampling):
    outputs = outputs_of(name)
    draws = draw(name, sampling, outputs, n=32768).reshape(32768, -1).astype(np.float64)
    spread = draws.std(axis=0) / np.sqrt(len(draws))
    assert np.abs(draws.mean(axis=0) / spread).max() < 5.5
    rows, columns = np.triu_indices(draws.shape[1])
    products = draws[:, rows] * draws[:, columns]
    exact = exact_covariance(name, outputs)[rows, columns]
    oracles.assert_unbiased(products, exact)
    oracles.assert_rejects_a_factor(products, exact, 2, 0.5)


@pytest.mark.parametrize("name", ["categorical", "bernoulli"])
def test_a_residual_is_a_probability_minus_a_label(name):
    outputs = outputs_of(name)
    draws = draw(name, "sample_residual", outputs, n=64).astype(np.float64)
    if name == "bernoulli":
        labels = scipy.special.expit(outputs) - draws
    else:
        labels = scipy.special.softmax(outputs.astype(np.float64), axis=-1) - draws
        np.testing.assert_allclose(labels.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(labels, np.round(labels), atol=1e-5)
    assert set(np.unique(np.round(labels))) == {0, 1}


def test_labels_are_drawn_as_often_as_the_model_says():
    logits = np.log(np.array([0.5, 0.25, 0.2, 0.05], np.float32))
    draws = draw("categorical", "sample_residual", logits, n=65536)
    labels = np.exp(logits) - draws
    np.testing.assert_allclose(labels.mean(axis=0), np.exp(logits), atol=0.01)


@pytest.mark.parametrize("shift", [0, 1e4, 1e6, 1e30])
def test_one_label_is_drawn_however_large_the_logits(shift):
    # The softmax of z + c is that of z, but float32 near 1e6 has steps of 1/16: noise added there
    # makes ties.
    logits = np.float32(shift) + np.array([0, 1, 1, 2], np.float32)
    draws = draw("categorical", "sample_residual", logits, n=4096, seed=2)
    labels = scipy.special.softmax(logits.astype(np.float64)) - draws
    np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-4)
    p = scipy.special.softmax(logits.astype(np.float64))
    np.testing.assert_allclose(labels.mean(axis=0), p, atol=0.04)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_draw_has_the_shape_and_dtype_of_the_outputs(name, sampling, dtype):
    with jax.enable_x64(dtype == "float64"):
        outputs = jnp.asarray(outputs_of(name), dtype)
        sample = getattr(getattr(sophia_optax, name), sampling)
        drawn = jax.eval_shape(sample, jax.random.key(0), outputs)
    assert drawn.shape == outputs.shape
    assert drawn.dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 1, 3)])
def test_any_number_of_leading_axes(name, sampling, leading):
    shape = (*leading, 4) if name == "categorical" else leading
    drawn = draw(name, sampling, np.zeros(shape, np.float32), n=2)
    assert drawn.shape == (2, *shape)
    assert np.all(np.isfinite(drawn))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_saturated_outputs_are_finite(sampling, scale):
    outputs = np.float32(scale) * np.array([[1, -1, 0], [0, 0, 1]], np.float32)
    for name in ("categorical", "bernoulli"):
        drawn = draw(name, sampling, outputs, n=32)
        assert np.all(np.isfinite(drawn)), name
        assert np.abs(drawn).max() <= 1


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_class_masked_with_minus_infinity_is_never_drawn(sampling):
    logits = np.array([0.3, -np.inf, -0.2, -np.inf], np.float32)
    drawn = draw("categorical", sampling, logits, n=4096)
    np.testing.assert_array_equal(drawn[:, [1, 3]], 0)
    unmasked = exact_covariance("categorical", logits[[0, 2]])
    products = drawn[:, [0, 0, 2]] * drawn[:, [0, 2, 2]]
    oracles.assert_unbiased(products, unmasked[[0, 0, 1], [0, 1, 1]])


@pytest.mark.parametrize("name", NAMES)
def test_they_satisfy_the_protocol(name):
    likelihood = getattr(sophia_optax, name)
    assert isinstance(likelihood, sophia_optax.Likelihood)
    assert likelihood.event_ndim == (1 if name == "categorical" else 0)


# --- the heavy tail of rare tokens ----------------------------------------------------------------


def relative_variance(samples: np.ndarray) -> np.ndarray:
    return samples.var(axis=0) / samples.mean(axis=0) ** 2


def test_curvature_propagation_has_no_heavy_tail_on_a_rare_class():
    # The square of a rare class's coordinate: with labels about 1 once in 1/p draws and p² else, a
    # relative variance of about 1/p; with factors a few units, whatever p is.
    p = np.array([1e-3, 1e-2, 0.1, 0.889])
    logits = np.log(p).astype(np.float32)
    labels, factors = (
        np.square(draw("categorical", sampling, logits, n=131072, seed=1).astype(np.float64))
        for sampling in SAMPLINGS
    )
    np.testing.assert_allclose(factors.mean(axis=0), p * (1 - p), rtol=0.05)
    np.testing.assert_allclose(labels.mean(axis=0), p * (1 - p), rtol=0.4)
    exact = (1 - 2 * p) ** 2 / (p * (1 - p))  # of (y - p)² for y ~ Bernoulli(p)
    np.testing.assert_allclose(relative_variance(labels), exact, rtol=0.4)
    assert relative_variance(labels)[0] > 500
    assert relative_variance(factors).max() < 4
    assert labels[:, 0].max() > 500 * labels[:, 0].mean()
    assert factors[:, 0].max() < 10 * factors[:, 0].mean()


def test_the_tail_is_gone_from_the_estimate_of_a_rare_tokens_row():
    tokens, vocabulary = 8, 20
    p = 1 / np.arange(1, vocabulary + 1) ** 1.5
    logits = np.log(p / p.sum()).astype(np.float32)

    def spread(sampling):
        hessian_fn = sophia_optax.gauss_newton_bartlett(
            lambda bias: jnp.broadcast_to(logits + bias, (tokens, vocabulary)),
            jnp.zeros(vocabulary),
            sampling=sampling,
        )
        samples = oracles.many(hessian_fn, seed=1, n=8192)
        np.testing.assert_allclose(
            samples.mean(axis=0)[-1], (p * (1 - p / p.sum()) / p.sum())[-1], rtol=0.2
        )
        return relative_variance(samples)[-1]

    # A square of a normal has 2. There are 0.04 rare labels a batch, hence about 2 + 1 / 0.04.
    assert spread("labels") > 10
    assert spread("curvature_propagation") < 3


def test_the_factor_of_a_confident_bernoulli_is_not_rounded_to_zero():
    """1 - sigmoid(20) is zero in float32."""
    factor = sophia_optax.bernoulli.sample_factor(jax.random.key(0), jnp.float32([20.0, -20.0]))
    np.testing.assert_allclose(np.abs(factor), np.exp(-10), rtol=1e-5)
