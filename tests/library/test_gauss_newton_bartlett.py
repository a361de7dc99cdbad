"""Gauss-Newton-Bartlett against dense Gauss-Newton matrices: its mean, its spread, its errors."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import sophia_optax
from tests import networks, oracles

SAMPLINGS = ("labels", "curvature_propagation")


def likelihood_of(network: networks.Network) -> sophia_optax.Likelihood:
    return getattr(sophia_optax, network.likelihood)


def estimator(network: networks.Network, dtype: Any = jnp.float32, **arguments: Any) -> Any:
    arguments = {"likelihood": likelihood_of(network), "weights": network.weights} | arguments
    if isinstance(arguments["weights"], np.ndarray):
        arguments["weights"] = jnp.asarray(arguments["weights"])
    params = networks.cast(network.params, dtype)
    return sophia_optax.gauss_newton_bartlett(network.outputs, params, **arguments)


@functools.cache
def exact_diagonal(network: networks.Network) -> np.ndarray:
    return oracles.ravel(
        oracles.gauss_newton_diagonal(
            network.outputs, network.params, network.likelihood, network.weights
        )
    )


# A model whose logits are linear in its parameters, on data that the tests reshape and weigh.
LINEAR_INPUTS = np.random.default_rng(7).normal(size=(12, 3)).astype(np.float32)
LINEAR_PARAMS = np.random.default_rng(8).normal(size=(3, 4)).astype(np.float32) / 2


def linear_outputs(shape: tuple[int, ...], inputs: np.ndarray = LINEAR_INPUTS) -> Any:
    """Params [3, V] to logits [*shape, V] on as many of the inputs as the shape takes."""
    count = int(np.prod(shape))

    def outputs(params):
        x = inputs[:count].reshape(*shape, 3).astype(params.dtype)
        return x @ params

    return outputs


@functools.cache
def linear_diagonal(count: int) -> np.ndarray:
    """Exact, for a mean over the first inputs, whatever the shape that they come in."""
    return oracles.gauss_newton_diagonal(linear_outputs((count,)), LINEAR_PARAMS, "categorical")


# --- what it estimates ----------------------------------------------------------------------------


@pytest.mark.parametrize("network", networks.NETWORKS, ids=repr)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_it_is_unbiased_for_the_gauss_newton_diagonal_of_the_weighted_mean_loss(network, sampling):
    samples = oracles.many(estimator(network, sampling=sampling), seed=1, n=16384)
    exact = exact_diagonal(network)
    oracles.assert_unbiased(samples, exact)
    batch = network.predictions()
    oracles.assert_rejects_a_factor(samples, exact, 2, 0.5, batch, 1 / batch, (batch + 1) / batch)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("shape", [(), (1,), (12,), (3, 4), (2, 3, 2), (1, 2, 1, 3)])
def test_any_number_of_leading_axes(sampling, shape):
    outputs = linear_outputs(shape)
    hessian_fn = sophia_optax.gauss_newton_bartlett(
        outputs, jnp.asarray(LINEAR_PARAMS), sampling=sampling
    )
    samples = oracles.many(hessian_fn, seed=2, n=8192)
    oracles.assert_unbiased(samples, linear_diagonal(int(np.prod(shape))))


@pytest.mark.parametrize("name", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_elementwise_likelihoods_have_a_prediction_for_each_element(name, sampling):
    weights = np.random.default_rng(9).uniform(size=(2, 3, 4)).astype(np.float32)
    outputs = linear_outputs((2, 3))
    hessian_fn = sophia_optax.gauss_newton_bartlett(
        outputs,
        jnp.asarray(LINEAR_PARAMS),
        likelihood=getattr(sophia_optax, name),
        weights=jnp.asarray(weights),
        sampling=sampling,
    )
    samples = oracles.many(hessian_fn, seed=3, n=8192)
    exact = oracles.gauss_newton_diagonal(outputs, LINEAR_PARAMS, name, weights)
    oracles.assert_unbiased(samples, exact)


def test_for_a_linear_model_it_and_hutchinson_have_the_same_mean():
    outputs = linear_outputs((3, 4))
    weights = np.random.default_rng(10).uniform(size=(3, 4)).astype(np.float32)
    labels = np.random.default_rng(11).integers(4, size=(3, 4))
    params = jnp.asarray(LINEAR_PARAMS)

    def loss(params):
        losses = networks.nll("categorical", outputs(params), labels)
        return jnp.sum(weights * losses) / jnp.sum(weights)

    hessian = oracles.hessian(loss, LINEAR_PARAMS)
    gauss_newton = oracles.gauss_newton(outputs, LINEAR_PARAMS, "categorical", weights)
    np.testing.assert_allclose(hessian, gauss_newton, atol=1e-12)
    exact = np.diagonal(hessian)
    oracles.assert_unbiased(
        oracles.many(sophia_optax.hutchinson(loss, params), seed=4, n=8192), exact
    )
    for sampling in SAMPLINGS:
        hessian_fn = sophia_optax.gauss_newton_bartlett(
            outputs, params, weights=jnp.asarray(weights), sampling=sampling
        )
        oracles.assert_unbiased(oracles.many(hessian_fn, seed=4, n=8192), exact)


# --- the batch factor -----------------------------------------------------------------------------


def gradients_on_labels(labels: np.ndarray) -> np.ndarray:
    """Of the mean loss on each row of labels, written out: mean_i x_i (p_i - onehot(y_i))ᵀ."""
    x = LINEAR_INPUTS[: labels.shape[-1]].astype(np.float64)
    p = scipy.special.softmax(x @ LINEAR_PARAMS, axis=-1)
    residuals = p - np.eye(p.shape[-1])[labels]
    return np.einsum("ic,nik->nck", x, residuals) / len(x)


def test_it_is_the_number_of_predictions_times_the_square_of_the_mean_loss_gradient():
    # Algorithm 2 of the paper by hand: labels from NumPy's generator, B ĝ ⊙ ĝ.
    batch, n = 12, 16384
    x = LINEAR_INPUTS.astype(np.float64)
    cumulative = np.cumsum(scipy.special.softmax(x @ LINEAR_PARAMS, axis=-1), axis=-1)
    uniform = np.random.default_rng(12).uniform(size=(n, batch, 1))
    labels = np.minimum((uniform > cumulative).sum(axis=-1), 3)
    by_hand = batch * np.square(gradients_on_labels(labels)).reshape(n, -1)

    outputs = linear_outputs((12,))
    exact = linear_diagonal(12)
    oracles.assert_unbiased(by_hand, exact)
    hessian_fn = sophia_optax.gauss_newton_bartlett(outputs, jnp.asarray(LINEAR_PARAMS))
    samples = oracles.many(hessian_fn, seed=5, n=n)
    oracles.assert_unbiased(samples, exact)
    # Not in the mean alone: it is the same distribution.
    np.testing.assert_allclose(samples.std(axis=0), by_hand.std(axis=0), rtol=0.1)


def test_every_draw_is_that_of_some_labels_and_each_comes_as_often_as_it_should():
    # Two predictions of four classes: 16 possible estimates, all written out.
    combinations = np.array(list(itertools.product(range(4), repeat=2)))
    possible = 2 * np.square(gradients_on_labels(combinations)).reshape(16, -1)
    p = scipy.special.softmax(LINEAR_INPUTS[:2].astype(np.float64) @ LINEAR_PARAMS, axis=-1)
    probability = p[0, combinations[:, 0]] * p[1, combinations[:, 1]]

    hessian_fn = sophia_optax.gauss_newton_bartlett(
        linear_outputs((2,)), jnp.asarray(LINEAR_PARAMS)
    )
    samples = oracles.many(hessian_fn, seed=6, n=8192)
    distances = np.abs(samples[:, None] - possible).max(axis=-1)
    assert distances.min(axis=1).max() < 1e-5
    counts = np.bincount(distances.argmin(axis=1), minlength=16)
    z = (counts - 8192 * probability) / np.sqrt(8192 * probability * (1 - probability))
    assert np.abs(z).max() < 5


# --- where it is exact ----------------------------------------------------------------------------

SCALES = np.array([0.5, -2.0, 3.0], np.float32)


@pytest.mark.parametrize(
    "name, hessian",
    [
        ("gaussian", np.ones(3)),
        ("bernoulli", scipy.special.expit(SCALES) * scipy.special.expit(-SCALES)),
    ],
)
def test_curvature_propagation_is_exact_with_a_parameter_to_each_output(name, hessian):
    # J is diagonal, so g_i = √(w_i / W) J_ii √H_i s_i, and s_i² = 1.
    weights = np.array([1.0, 0.0, 4.0], np.float32)
    hessian_fn = sophia_optax.gauss_newton_bartlett(
        lambda w: w * SCALES,
        jnp.ones(3),
        likelihood=getattr(sophia_optax, name),
        weights=jnp.asarray(weights),
        sampling="curvature_propagation",
    )
    compiled = jax.jit(hessian_fn)
    for seed in range(4):
        estimate = compiled(jax.random.key(seed))
        np.testing.assert_allclose(estimate, weights / 5 * hessian * SCALES**2, rtol=1e-5)


@pytest.mark.parametrize("name", ["gaussian", "bernoulli"])
def test_curvature_propagation_is_exact_for_a_single_scalar_prediction(name):
    # G = J H Jᵀ has rank one, and g = J √H s.
    network = networks.MLP_GAUSSIAN
    params = networks.cast(network.params, jnp.float32)

    def outputs(params):
        return network.outputs(params)[2, 1]

    exact = oracles.gauss_newton_diagonal(outputs, network.params, name)
    hessian_fn = sophia_optax.gauss_newton_bartlett(
        outputs,
        params,
        likelihood=getattr(sophia_optax, name),
        sampling="curvature_propagation",
    )
    compiled = jax.jit(hessian_fn)
    for seed in range(4):
        estimate = oracles.ravel(compiled(jax.random.key(seed)))
        np.testing.assert_allclose(estimate, oracles.ravel(exact), rtol=1e-4, atol=1e-7)


def test_labels_are_exact_for_a_fair_coin():
    # The residual is ± 1/2 whichever label is drawn: a sigmoid at zero, two equal logits.
    x = jnp.array([1.0, -2.0, 3.0])
    coin = sophia_optax.gauss_newton_bartlett(
        lambda w: w @ x, jnp.zeros(3), likelihood=sophia_optax.bernoulli
    )
    two_classes = sophia_optax.gauss_newton_bartlett(lambda w: w @ x, jnp.zeros((2, 3)))
    both = jax.jit(lambda key: (coin(key), two_classes(key)))
    for seed in range(4):
        of_coin, of_classes = both(jax.random.key(seed))
        np.testing.assert_allclose(of_coin, x**2 / 4, rtol=1e-5)
        np.testing.assert_allclose(of_classes, [x**2 / 4, x**2 / 4], rtol=1e-5)


# --- weights --------------------------------------------------------------------------------------


def same_key(hessian_fn: Any) -> np.ndarray:
    return oracles.ravel(hessian_fn(jax.random.key(13)))


def linear_estimate(weights: Any, inputs: np.ndarray = LINEAR_INPUTS, **arguments: Any) -> Any:
    outputs = linear_outputs((3, 4), inputs)
    params = jnp.asarray(LINEAR_PARAMS)
    return same_key(
        sophia_optax.gauss_newton_bartlett(outputs, params, weights=weights, **arguments)
    )


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_only_the_ratios_of_weights_matter(sampling):
    weights = jnp.arange(12.0).reshape(3, 4)
    estimate = linear_estimate(weights, sampling=sampling)
    for scale in (0.25, 1e-6, 1e6):
        scaled = linear_estimate(scale * weights, sampling=sampling)
        np.testing.assert_allclose(scaled, estimate, rtol=1e-5)


def test_equal_weights_are_no_weights():
    plain = linear_estimate(None)
    for weights in (1.0, 7, jnp.float32(2), jnp.ones((3, 4)), jnp.full((1, 1), 3.0)):
        np.testing.assert_allclose(linear_estimate(weights), plain, rtol=1e-5)


def test_weights_broadcast_along_axes_of_length_one():
    for shape in ((3, 1), (1, 4)):
        weights = jnp.asarray(np.random.default_rng(14).uniform(size=shape), jnp.float32)
        full = jnp.broadcast_to(weights, (3, 4))
        np.testing.assert_allclose(linear_estimate(weights), linear_estimate(full), rtol=1e-5)


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32, np.float16])
@pytest.mark.parametrize("library", [np, jnp], ids=["numpy", "jax"])
def test_masks_of_any_dtype(dtype, library):
    mask = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    expected = linear_estimate(jnp.asarray(mask, jnp.float32))
    estimate = linear_estimate(library.asarray(mask, dtype=dtype))
    np.testing.assert_allclose(estimate, expected, rtol=1e-6)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_what_a_masked_prediction_sees_is_nothing_to_the_estimate(sampling):
    mask = np.ones((3, 4), np.float32)
    mask[0, 1:] = 0
    mask[2, 3] = 0
    other = LINEAR_INPUTS.copy()
    other[mask.ravel() == 0] += 5
    weights = jnp.asarray(mask)
    estimate = linear_estimate(weights, sampling=sampling)
    np.testing.assert_allclose(
        linear_estimate(weights, other, sampling=sampling), estimate, rtol=1e-5
    )
    assert not np.allclose(linear_estimate(None, other, sampling=sampling), estimate, rtol=1e-2)


def test_masking_counts_predictions_not_sequences():
    # Half of the tokens masked is the same mean as half of them absent.
    weights = np.zeros((12,), np.float32)
    weights[:6] = 1
    outputs = linear_outputs((12,))
    hessian_fn = sophia_optax.gauss_newton_bartlett(
        outputs, jnp.asarray(LINEAR_PARAMS), weights=jnp.asarray(weights)
    )
    samples = oracles.many(hessian_fn, seed=15, n=8192)
    exact = linear_diagonal(6)
    oracles.assert_unbiased(samples, exact)
    oracles.assert_rejects_a_factor(samples, exact, 2, 0.5)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("samples", [1, 3])
def test_no_weight_at_all_is_nan(sampling, samples):
    estimate = linear_estimate(jnp.zeros((3, 4)), sampling=sampling, num_samples=samples)
    assert np.all(np.isnan(estimate))
    assert np.all(np.isnan(linear_estimate(0.0)))


def test_weights_may_be_traced():
    outputs, params = linear_outputs((3, 4)), jnp.asarray(LINEAR_PARAMS)

    @jax.jit
    def estimate(weights, key):
        return sophia_optax.gauss_newton_bartlett(outputs, params, weights=weights)(key)

    weights = jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_allclose(
        oracles.ravel(estimate(weights, jax.random.key(13))), linear_estimate(weights), rtol=1e-6
    )


@pytest.mark.parametrize(
    "weights",
    [(12,), (4,), (3, 4, 1), (3, 4, 4), (1, 3, 4), (3, 3), (4, 3), (2, 4), (3, 0)],
    ids=str,
)
def test_weights_that_do_not_fit_are_refused_with_both_shapes(weights):
    hessian_fn = sophia_optax.gauss_newton_bartlett(
        linear_outputs((3, 4)), jnp.asarray(LINEAR_PARAMS), weights=jnp.ones(weights)
    )
    with pytest.raises(ValueError, match="weights") as caught:
        hessian_fn(jax.random.key(0))
    assert str(weights) in str(caught.value)
    assert "(3, 4)" in str(caught.value)


# --- several samples ------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_its_variance_falls_as_one_over_the_samples(sampling):
    def spread(num_samples):
        hessian_fn = sophia_optax.gauss_newton_bartlett(
            linear_outputs((6,)),
            jnp.asarray(LINEAR_PARAMS),
            sampling=sampling,
            num_samples=num_samples,
        )
        samples = oracles.many(hessian_fn, seed=16, n=8192)
        oracles.assert_unbiased(samples, linear_diagonal(6))
        return samples.var(axis=0)

    one = spread(1)
    counted = one > 1e-4 * one.max()
    for num_samples in (4, 9):
        ratios = num_samples * spread(num_samples)[counted] / one[counted]
        np.testing.assert_allclose(ratios, 1, atol=0.3)
        np.testing.assert_allclose(ratios.mean(), 1, atol=0.06)


@pytest.mark.parametrize("num_samples", [1, 8])
def test_the_samples_share_one_forward_pass(num_samples):
    calls = []

    def outputs(params):
        jax.debug.callback(lambda: calls.append(1))
        return linear_outputs((12,))(params)

    hessian_fn = sophia_optax.gauss_newton_bartlett(
        outputs, jnp.asarray(LINEAR_PARAMS), num_samples=num_samples
    )
    jax.block_until_ready(jax.jit(hessian_fn)(jax.random.key(0)))
    jax.effects_barrier()
    assert len(calls) == 1


def temporaries(num_samples: int) -> int:
    x = jnp.ones((512, 32))
    params = {"layers": jnp.ones((4, 32, 32)) / 32, "out": jnp.ones((32, 8))}

    def outputs(params):
        hidden, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])
        return hidden @ params["out"]

    hessian_fn = sophia_optax.gauss_newton_bartlett(outputs, params, num_samples=num_samples)
    compiled = jax.jit(hessian_fn).lower(jax.random.key(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_memory_of_several_samples_does_not_grow_with_them():
    one, two, eight = map(temporaries, (1, 2, 8))
    assert eight <= 1.001 * two
    assert eight <= 1.3 * one  # one pullback more than the forward pass, which they share


# --- trees and dtypes -----------------------------------------------------------------------------


@pytest.mark.parametrize("network", [networks.MLP_CATEGORICAL, networks.RECURRENT], ids=repr)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_bfloat16_params_and_outputs_have_a_float32_estimate(network, sampling):
    hessian_fn = estimator(network, jnp.bfloat16, sampling=sampling)
    outputs = jax.eval_shape(network.outputs, networks.cast(network.params, jnp.bfloat16))
    assert outputs.dtype == jnp.bfloat16
    tree = jax.eval_shape(hessian_fn, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(tree)} == {np.dtype("float32")}
    samples = oracles.many(hessian_fn, seed=17, n=8192)
    exact = exact_diagonal(network)
    slope = np.mean(samples @ exact) / (exact @ exact)
    np.testing.assert_allclose(slope, 1, atol=0.06)


def test_labels_are_drawn_in_float32_from_bfloat16_logits():
    # 64 equal logits with bfloat16 noise would tie in every other draw.
    hessian_fn = sophia_optax.gauss_newton_bartlett(lambda z: z, jnp.ones(64, jnp.bfloat16))
    samples = oracles.many(hessian_fn, seed=20, n=512)
    np.testing.assert_array_equal((samples > 0.5).sum(axis=1), 1)
    np.testing.assert_allclose(samples.sum(axis=1), 1 - 1 / 64, rtol=0.02)


def test_the_weights_of_many_narrow_outputs_are_summed_in_float32():
    # The largest number in float16 is 65504.
    count = 70_000
    hessian_fn = sophia_optax.gauss_newton_bartlett(
        lambda w: w * jnp.ones(count, jnp.float16),
        jnp.ones(count, jnp.float16),
        likelihood=sophia_optax.gaussian,
        weights=jnp.ones(count, jnp.float16),
        sampling="curvature_propagation",
    )
    np.testing.assert_allclose(jax.jit(hessian_fn)(jax.random.key(0)), 1 / count, rtol=0.01)


def test_float64_params_have_a_float64_estimate():
    with jax.enable_x64(True):
        hessian_fn = estimator(networks.MLP_CATEGORICAL, jnp.float64)
        tree = jax.eval_shape(hessian_fn, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(tree)} == {np.dtype("float64")}


def test_every_kind_of_leaf():
    params = {
        "bf16": jnp.ones(2, jnp.bfloat16),
        "empty": jnp.zeros((0, 3)),
        "int": jnp.arange(3),
        "none": None,
        "numpy": np.array([[3.0]], np.float32),
        "scalar": jnp.float32(2.0),
        "unused": jnp.ones(2),
    }

    def outputs(p):
        assert p["none"] is None
        assert p["int"].dtype == jnp.int32
        bf16 = p["bf16"].astype(jnp.float32)
        return jnp.stack([bf16[0], 2 * bf16[1], p["numpy"][0, 0], p["scalar"] * p["int"][2]])

    hessian_fn = sophia_optax.gauss_newton_bartlett(
        outputs, params, likelihood=sophia_optax.gaussian, sampling="curvature_propagation"
    )
    estimate = jax.jit(hessian_fn)(jax.random.key(0))
    expected = {
        "bf16": np.array([0.25, 1.0]),
        "empty": np.zeros((0, 3)),
        "int": np.zeros(3),
        "none": None,
        "numpy": np.array([[0.25]]),
        "scalar": np.float64(1.0),
        "unused": np.zeros(2),
    }
    assert jax.tree.structure(estimate) == jax.tree.structure(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), estimate, expected)
    assert jax.tree.map(np.shape, estimate) == jax.tree.map(np.shape, params)
    assert {x.dtype for x in jax.tree.leaves(estimate)} == {np.dtype("float32")}


@pytest.mark.parametrize("params", [{}, None, (), {"n": np.arange(3)}, {"e": np.zeros((0,))}])
def test_trees_without_a_coordinate(params):
    hessian_fn = sophia_optax.gauss_newton_bartlett(lambda p: jnp.ones((2, 3)), params)
    estimate = hessian_fn(jax.random.key(0))
    assert jax.tree.structure(estimate) == jax.tree.structure(params)
    assert jax.tree.map(np.shape, estimate) == jax.tree.map(np.shape, params)
    assert not np.any(oracles.ravel(estimate))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_it_is_never_negative_and_the_key_alone_decides(sampling):
    compiled = jax.jit(estimator(networks.MLP_BERNOULLI, sampling=sampling))
    first, again, other = (oracles.ravel(compiled(jax.random.key(k))) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.all(first >= 0)
    assert np.any(first > 0)


# --- likelihoods of the user's own ----------------------------------------------------------------


class Poisson:
    """Counts with a log rate for each output."""

    event_ndim = 0

    def sample_residual(self, key, outputs):
        rate = jnp.exp(outputs)
        return rate - jax.random.poisson(key, rate).astype(outputs.dtype)

    def sample_factor(self, key, outputs):
        signs = jax.random.rademacher(key, outputs.shape, outputs.dtype)
        return jnp.exp(outputs / 2) * signs


class GaussianImage:
    """A prediction of two axes: every pixel a mean with unit variance."""

    event_ndim = 2

    def sample_residual(self, key, outputs):
        return jax.random.normal(key, outputs.shape, outputs.dtype)

    def sample_factor(self, key, outputs):
        return jax.random.rademacher(key, outputs.shape, outputs.dtype)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_likelihood_of_the_users_own(sampling):
    assert isinstance(Poisson(), sophia_optax.Likelihood)
    network = networks.MLP_GAUSSIAN
    weights = np.array([[1.0], [0.0], [2.0], [1.0], [1.0], [0.5]], np.float32)
    hessian_fn = estimator(
        network, likelihood=Poisson(), weights=jnp.asarray(weights), sampling=sampling
    )
    samples = oracles.many(hessian_fn, seed=18, n=16384)
    exact = oracles.gauss_newton_diagonal(network.outputs, network.params, "poisson", weights)
    oracles.assert_unbiased(samples, exact)
    oracles.assert_rejects_a_factor(samples, exact, 2, 0.5)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_prediction_may_have_several_axes(sampling):
    # The mean over 3 images of sums over 2 x 2 pixels: 4 times a mean over 12 pixels.
    weights = np.array([1.0, 3.0, 0.0], np.float32)

    def images(params):
        return (LINEAR_INPUTS @ params).reshape(3, 4, 4)

    hessian_fn = sophia_optax.gauss_newton_bartlett(
        images,
        jnp.asarray(LINEAR_PARAMS),
        likelihood=GaussianImage(),
        weights=jnp.asarray(weights),
        sampling=sampling,
    )
    samples = oracles.many(hessian_fn, seed=19, n=8192)
    pixels = weights[:, None, None]
    exact = oracles.gauss_newton_diagonal(images, LINEAR_PARAMS, "gaussian", pixels)
    oracles.assert_unbiased(samples, 16 * exact)


# --- when it runs ---------------------------------------------------------------------------------


def test_nothing_is_computed_before_the_call():
    def outputs(params):
        raise AssertionError("called")

    hessian_fn = sophia_optax.gauss_newton_bartlett(outputs, jnp.ones(2))
    assert isinstance(hessian_fn, sophia_optax.HessianFn)


def test_it_needs_first_derivatives_only():
    def outside(function, x):
        result = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(function, result, x, vmap_method="sequential")

    @jax.custom_vjp
    def kernel(x):
        return outside(np.tanh, x)

    kernel.defvjp(
        lambda x: (kernel(x), x),
        lambda x, cotangent: (cotangent * outside(lambda x: 1 - np.tanh(x) ** 2, x),),
    )

    def outputs(params, tanh):
        return tanh(LINEAR_INPUTS @ params)

    params = jnp.asarray(LINEAR_PARAMS)
    through_kernel = functools.partial(outputs, tanh=kernel)
    plainly = functools.partial(outputs, tanh=jnp.tanh)
    hutchinson = sophia_optax.hutchinson(lambda p: jnp.sum(through_kernel(p) ** 2), params)
    with pytest.raises(NotImplementedError, match="gauss_newton_bartlett"):
        hutchinson(jax.random.key(0))
    for num_samples in (1, 2):
        estimates = jax.jit(
            lambda key, n=num_samples: [
                sophia_optax.gauss_newton_bartlett(fn, params, num_samples=n)(key)
                for fn in (through_kernel, plainly)
            ]
        )
        np.testing.assert_allclose(*estimates(jax.random.key(13)), rtol=1e-4, atol=1e-7)


def test_it_runs_under_vmap_scan_and_cond():
    outputs = linear_outputs((2, 3))
    keys = jax.random.split(jax.random.key(0), 3)

    def estimate(params, key):
        return sophia_optax.gauss_newton_bartlett(outputs, params, num_samples=2)(key)

    params = jnp.asarray(LINEAR_PARAMS)
    compiled = jax.jit(estimate)
    expected = [compiled(params, key) for key in keys]
    mapped = jax.jit(jax.vmap(estimate, in_axes=(None, 0)))(params, keys)
    np.testing.assert_allclose(mapped, expected, rtol=1e-5)

    def step(x, key):
        return x, jax.lax.cond(x[0, 0] < 9, lambda: estimate(x, key), lambda: jnp.zeros((3, 4)))

    _, scanned = jax.jit(lambda: jax.lax.scan(step, params, keys))()
    np.testing.assert_allclose(scanned, expected, rtol=1e-5)


# --- how it fails ---------------------------------------------------------------------------------


CATEGORICALS = (sophia_optax.categorical, sophia_optax.categorical)


@pytest.mark.parametrize(
    "outputs, words",
    [
        (lambda p: (p, p), ("outputs_fn",)),
        (lambda p: {"logits": p}, ("outputs_fn", "logits")),
        (lambda p: jnp.argmax(p, axis=-1), ("outputs_fn", "int32")),
        (lambda p: p.astype(jnp.complex64), ("outputs_fn", "complex64")),
        (jnp.sum, ("outputs_fn", "()")),
    ],
    ids=["tuple", "dict", "integers", "complex", "no axis of classes"],
)
def test_outputs_that_are_no_logits(outputs, words):
    hessian_fn = sophia_optax.gauss_newton_bartlett(outputs, jnp.ones((2, 3)))
    with pytest.raises((TypeError, ValueError)) as caught:
        hessian_fn(jax.random.key(0))
    for word in words:
        assert word in str(caught.value)


def test_several_outputs_have_the_structure_of_their_likelihoods():
    hessian_fn = sophia_optax.gauss_newton_bartlett(
        lambda p: {"first": p}, jnp.ones((2, 3)), likelihood=CATEGORICALS
    )
    with pytest.raises(TypeError, match=r"outputs_fn returned .*first.*Give each output"):
        hessian_fn(jax.random.key(0))


def test_an_error_of_the_users_own_passes_through():
    def outputs(params):
        return params @ jnp.ones((7, 2))

    with pytest.raises(TypeError) as plain:
        outputs(jnp.ones(3))
    with pytest.raises(TypeError) as caught:
        sophia_optax.gauss_newton_bartlett(outputs, jnp.ones(3))(jax.random.key(0))
    assert str(caught.value) == str(plain.value)


def test_complex_leaves_are_refused_by_name():
    params = {"phase": jnp.ones(2, jnp.complex64)}
    with pytest.raises(TypeError, match="complex64") as caught:
        sophia_optax.gauss_newton_bartlett(lambda p: jnp.abs(p["phase"]), params)
    assert "['phase']" in str(caught.value)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"num_samples": 0}, ValueError, ("num_samples", "0")),
        ({"num_samples": -1}, ValueError, ("num_samples", "-1")),
        ({"num_samples": 2.5}, ValueError, ("num_samples", "2.5")),
        ({"num_samples": "2"}, TypeError, ("num_samples", "'2'")),
        ({"sampling": "label"}, ValueError, ("sampling", "label", "curvature_propagation")),
        ({"likelihood": CATEGORICALS, "weights": (None,)}, TypeError, ("weights are", "PyTreeDef")),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_once(arguments, error, words):
    function = sophia_optax.gauss_newton_bartlett
    unchecked = getattr(function, "__wrapped__", function)  # our own words, not the type checker's
    with pytest.raises(error) as caught:
        unchecked(lambda x: x, jnp.ones(3), **arguments)
    for word in words:
        assert word in str(caught.value)


def test_narrow_gradients_are_squared_in_float32():
    """The root of an estimate is a bfloat16 number, and its square is not."""
    params = jnp.asarray(np.linspace(1, 2, 16), jnp.bfloat16)
    features = jnp.asarray(np.linspace(0.5, 1, 16), jnp.bfloat16)
    hessian_fn = sophia_optax.gauss_newton_bartlett(
        lambda p: jnp.dot(features, p)[None], params, likelihood=sophia_optax.gaussian
    )
    estimate = np.asarray(hessian_fn(jax.random.key(0)))
    root = np.sqrt(np.float64(estimate))
    np.testing.assert_allclose(root, np.asarray(jnp.bfloat16(root), np.float64), rtol=1e-6)
    assert np.mean(estimate == np.asarray(jnp.bfloat16(estimate), np.float32)) < 0.5
