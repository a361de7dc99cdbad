"""Hutchinson's estimator against dense Hessians: its mean, its spread, its errors."""

import functools
import re
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sophia_optax
from sophia_optax._hutchinson import _finite_difference, _multiply
from tests import networks, oracles

MODES = ("forward_over_reverse", "reverse_over_reverse", "finite_difference")
DISTRIBUTIONS = ("rademacher", "gaussian")
TOLERANCES = {"forward_over_reverse": 1e-5, "reverse_over_reverse": 1e-5, "finite_difference": 1e-2}


def close(actual: Any, expected: Any, tolerance: float) -> None:
    """Asserts that two trees differ by at most a share of the largest expected coordinate."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    want = oracles.ravel(expected)
    scale = np.abs(want).max(initial=0)
    np.testing.assert_allclose(oracles.ravel(actual), want, rtol=0, atol=tolerance * scale)


def symmetric(seed: int, n: int) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(n, n))
    return ((factor + factor.T) / 2).astype(np.float32)


def quadratic(matrix: np.ndarray) -> Any:
    return lambda x: x @ matrix.astype(x.dtype) @ x / 2


class Pair(NamedTuple):
    first: Any
    second: Any


# --- what it estimates ----------------------------------------------------------------------------

SEPARABLE_PARAMS = {
    "matrix": np.array([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]], np.float32),
    "pair": Pair(np.float32(1.5), np.array([2.0], np.float32)),
}


def separable_loss(params: Any) -> jax.Array:
    """Σ_j c_j x_j⁴ / 12: the Hessian is diagonal, c_j x_j²."""
    leaves = jax.tree.leaves(params)
    return sum(jnp.sum((k + 1.0) * leaf**4 / 12) for k, leaf in enumerate(leaves))


def separable_diagonal() -> Any:
    leaves, treedef = jax.tree.flatten(SEPARABLE_PARAMS)
    return treedef.unflatten([(k + 1.0) * leaf**2 for k, leaf in enumerate(leaves)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("probes", [1, 3])
def test_hutchinson_is_exact_when_the_hessian_is_diagonal(mode, probes):
    params = networks.cast(SEPARABLE_PARAMS, jnp.float32)
    hessian_fn = sophia_optax.hutchinson(separable_loss, params, mode=mode, num_probes=probes)
    for seed in range(3):
        estimate = jax.jit(hessian_fn)(jax.random.key(seed))
        close(estimate, separable_diagonal(), TOLERANCES[mode])


def test_gaussian_probes_are_not_exact_there():
    params = networks.cast(SEPARABLE_PARAMS, jnp.float32)
    hessian_fn = sophia_optax.hutchinson(separable_loss, params, distribution="gaussian")
    estimate = jax.jit(hessian_fn)(jax.random.key(0))
    ratios = oracles.ravel(estimate) / oracles.ravel(separable_diagonal())
    assert np.ptp(ratios) > 0.1


@functools.cache
def network_samples(network: networks.Network, distribution: str) -> np.ndarray:
    params = networks.cast(network.params, jnp.float32)
    hessian_fn = sophia_optax.hutchinson(network.loss, params, distribution=distribution)
    return oracles.many(hessian_fn, seed=1, n=16384)


@functools.cache
def network_hessian(network: networks.Network) -> np.ndarray:
    return oracles.hessian(network.loss, network.params)


@pytest.mark.parametrize("network", networks.NETWORKS, ids=repr)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_hutchinson_is_unbiased(network, distribution):
    samples = network_samples(network, distribution)
    exact = np.diagonal(network_hessian(network))
    oracles.assert_unbiased(samples, exact)
    oracles.assert_rejects_a_factor(samples, exact, 2, 0.5, -1, network.predictions())


def test_leaves_of_the_same_shape_have_probes_of_their_own():
    # H couples x with y alone: u_x u_y has mean zero unless the two share a probe.
    params = {"x": jnp.ones(4), "y": jnp.ones(4)}
    hessian_fn = sophia_optax.hutchinson(lambda p: p["x"] @ p["y"], params)
    samples = oracles.many(hessian_fn, seed=3, n=4096)
    np.testing.assert_allclose(np.abs(samples), 1)
    assert np.abs(samples.mean(axis=0)).max() < 6 / np.sqrt(4096)
    correlations = np.corrcoef(samples[:, :4], rowvar=False) - np.eye(4)
    assert np.abs(correlations).max() < 6 / np.sqrt(4096)


# --- how it spreads -------------------------------------------------------------------------------


def exact_variances(hessian: np.ndarray, distribution: str) -> np.ndarray:
    diagonal = np.square(np.diagonal(hessian))
    off_diagonal = np.square(hessian).sum(axis=1) - diagonal
    return off_diagonal + (2 * diagonal if distribution == "gaussian" else 0)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_its_variance_is_that_of_the_formula(distribution):
    # Diagonal and off-diagonal entries of like size, so that each term of the formula counts.
    matrix = symmetric(0, 6) + 3 * np.diag([1, -1, 2, 0, 1, -2]).astype(np.float32)
    hessian_fn = sophia_optax.hutchinson(quadratic(matrix), jnp.ones(6), distribution=distribution)
    samples = oracles.many(hessian_fn, seed=4, n=65536)
    ratios = oracles.variance_ratios(samples, exact_variances(matrix, distribution))
    np.testing.assert_allclose(ratios, 1, atol=0.06)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_its_variance_is_that_of_the_formula_on_a_network(distribution):
    samples = network_samples(networks.RECURRENT, distribution)
    hessian = network_hessian(networks.RECURRENT)
    ratios = oracles.variance_ratios(samples, exact_variances(hessian, distribution), floor=1e-3)
    assert ratios.size > 20
    np.testing.assert_allclose(ratios, 1, atol=0.25)
    np.testing.assert_allclose(ratios.mean(), 1, atol=0.04)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("probes, chunk", [(4, 1), (4, 4), (16, 4)])
def test_its_variance_falls_as_one_over_the_probes(distribution, probes, chunk):
    matrix = symmetric(1, 6)
    hessian_fn = sophia_optax.hutchinson(
        quadratic(matrix),
        jnp.ones(6),
        num_probes=probes,
        probe_chunk=chunk,
        distribution=distribution,
    )
    samples = oracles.many(hessian_fn, seed=6, n=8192)
    ratios = oracles.variance_ratios(samples, exact_variances(matrix, distribution) / probes)
    np.testing.assert_allclose(ratios, 1, atol=0.15)
    oracles.assert_unbiased(samples, np.diagonal(matrix))


# --- what changes nothing -------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_chunk_size_changes_nothing(distribution):
    loss = quadratic(symmetric(2, 6))

    @oracles.jit
    def estimates(key):
        return [
            sophia_optax.hutchinson(
                loss, jnp.ones(6), num_probes=6, probe_chunk=chunk, distribution=distribution
            )(key)
            for chunk in (1, 2, 3, 6)
        ]

    one, *others = estimates(jax.random.key(7))
    for other in others:
        close(other, one, 1e-5)


@pytest.mark.parametrize(
    "network, distribution",
    [(networks.MLP_BERNOULLI, "gaussian"), (networks.STACKED, "rademacher")],
    ids=str,
)
def test_the_modes_agree(network, distribution):
    params = networks.cast(network.params, jnp.float32)

    @oracles.jit
    def estimates(key):
        return [
            sophia_optax.hutchinson(network.loss, params, mode=mode, distribution=distribution)(key)
            for mode in MODES
        ]

    forward, reverse, difference = estimates(jax.random.key(8))
    close(reverse, forward, 1e-5)
    close(difference, forward, 1e-2)


def test_the_modes_agree_more_closely_in_float64():
    network = networks.MLP_CATEGORICAL
    with jax.enable_x64(True):
        params = networks.cast(network.params, jnp.float64)

        @oracles.jit
        def estimates(key):
            return [sophia_optax.hutchinson(network.loss, params, mode=m)(key) for m in MODES]

        forward, reverse, difference = estimates(jax.random.key(9))
    assert {x.dtype for x in jax.tree.leaves((forward, reverse, difference))} == {
        np.dtype("float64")
    }
    close(reverse, forward, 1e-13)
    close(difference, forward, 1e-7)


def test_finite_differences_keep_their_step_in_proportion_to_the_params():
    # At |θ| = 1000 a fixed step would drown: float32 has seven digits.
    x = jnp.array([1000.0, -800.0, 500.0])
    hessian_fn = sophia_optax.hutchinson(lambda x: jnp.sum(x**3) / 6, x, mode="finite_difference")
    np.testing.assert_allclose(hessian_fn(jax.random.key(0)), x, rtol=1e-2)


@oracles.jit
def linear_combinations(a: Any, b: Any, seed: Any) -> tuple[Any, Any]:
    """The estimate for a L₁ + b L₂, and a, b times the estimates for L₁, L₂."""
    first, second = quadratic(symmetric(4, 6)), separable_loss
    params = jnp.linspace(-1, 1, 6)

    def estimate(loss_fn):
        return sophia_optax.hutchinson(loss_fn, params)(jax.random.key(seed))

    apart = jax.tree.map(lambda x, y: a * x + b * y, estimate(first), estimate(second))
    return estimate(lambda p: a * first(p) + b * second(p)), apart


@hypothesis.given(st.floats(-8, 8, width=32), st.floats(-8, 8, width=32), st.integers(0, 2**31 - 1))
def test_the_estimate_is_linear_in_the_loss(a, b, seed):
    both, apart = linear_combinations(a, b, seed)
    np.testing.assert_allclose(oracles.ravel(both), oracles.ravel(apart), rtol=1e-4, atol=1e-4)


def test_the_key_alone_decides():
    hessian_fn = sophia_optax.hutchinson(quadratic(symmetric(3, 6)), jnp.ones(6))
    first, again, other = (oracles.ravel(hessian_fn(jax.random.key(k))) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    compiled = oracles.ravel(jax.jit(hessian_fn)(jax.random.key(1)))
    np.testing.assert_allclose(compiled, first, atol=1e-5 * np.abs(first).max())


def test_remat_changes_nothing():
    network = networks.RECURRENT
    params = networks.cast(network.params, jnp.float32)

    @oracles.jit
    def estimates(key):
        losses = network.loss, jax.checkpoint(network.loss)
        return [sophia_optax.hutchinson(loss, params)(key) for loss in losses]

    plain, remat = estimates(jax.random.key(0))
    close(remat, plain, 1e-5)


# --- trees and dtypes -----------------------------------------------------------------------------


def test_every_kind_of_leaf():
    params = {
        "bf16": jnp.array([1.0, -2.0], jnp.bfloat16),
        "empty": jnp.zeros((0, 3)),
        "f16": jnp.array([0.5], jnp.float16),
        "int": jnp.arange(3),
        "bool": jnp.array([True, False]),
        "none": None,
        "numpy": np.array([3.0], np.float32),
        "pair": Pair(jnp.float32(2.0), ()),
    }

    def loss(p):
        assert p["none"] is None
        assert p["int"].dtype == jnp.int32
        assert p["bf16"].dtype == jnp.bfloat16
        total = sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in (p["bf16"], p["f16"], p["numpy"]))
        return total / 2 + jnp.sum(p["empty"]) + p["pair"].first ** 3 / 6 * p["int"][1]

    estimate = jax.jit(sophia_optax.hutchinson(loss, params))(jax.random.key(0))
    assert jax.tree.structure(estimate) == jax.tree.structure(params)
    expected = {
        "bf16": np.ones(2),
        "empty": np.zeros((0, 3)),
        "f16": np.ones(1),
        "int": np.zeros(3),
        "bool": np.zeros(2),
        "none": None,
        "numpy": np.ones(1),
        "pair": Pair(np.float64(2.0), ()),
    }
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), estimate, expected)
    assert jax.tree.map(np.shape, estimate) == jax.tree.map(np.shape, params)
    assert {x.dtype for x in jax.tree.leaves(estimate)} == {np.dtype("float32")}


@pytest.mark.parametrize("params", [{}, None, (), {"n": np.arange(3)}, {"e": np.zeros((0,))}])
@pytest.mark.parametrize("mode", MODES)
def test_trees_without_a_coordinate(params, mode):
    estimate = sophia_optax.hutchinson(lambda p: jnp.float32(0), params, mode=mode)(
        jax.random.key(0)
    )
    assert jax.tree.structure(estimate) == jax.tree.structure(params)
    assert jax.tree.map(np.shape, estimate) == jax.tree.map(np.shape, params)
    assert not np.any(oracles.ravel(estimate))


@pytest.mark.parametrize("mode", MODES)
def test_a_bare_scalar(mode):
    hessian_fn = sophia_optax.hutchinson(lambda x: x**4 / 12, jnp.float32(3.0), mode=mode)
    estimate = hessian_fn(jax.random.key(0))
    assert estimate.shape == ()
    np.testing.assert_allclose(estimate, 9, rtol=1e-2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "loss", [lambda x: jnp.sum(3 * x), lambda x: jnp.float32(1.0)], ids=["linear", "constant"]
)
def test_no_curvature_is_zero(loss, mode):
    hessian_fn = sophia_optax.hutchinson(loss, jnp.ones(3), mode=mode)
    np.testing.assert_allclose(hessian_fn(jax.random.key(0)), np.zeros(3), atol=1e-3)


@pytest.mark.parametrize(
    "dtype, distribution",
    [(jnp.bfloat16, "rademacher"), (jnp.bfloat16, "gaussian"), (jnp.float16, "rademacher")],
)
def test_narrow_params_have_a_float32_estimate_that_is_unbiased(distribution, dtype):
    network = networks.MLP_CATEGORICAL
    params = networks.cast(network.params, dtype)
    hessian_fn = sophia_optax.hutchinson(network.loss, params, distribution=distribution)
    estimate = jax.eval_shape(hessian_fn, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(estimate)} == {np.dtype("float32")}
    samples = oracles.many(hessian_fn, seed=10, n=8192)
    exact = oracles.ravel(oracles.hessian_diagonal(network.loss, params))
    # Rounding within the loss biases an estimate by a few units in the last place, no more.
    bound = 4 * float(jnp.finfo(dtype).eps) * np.abs(exact).max()
    noise = 5 * samples.std(axis=0) / np.sqrt(len(samples))
    assert np.all(np.abs(samples.mean(axis=0) - exact) < bound + noise)
    slope = np.mean(samples @ exact) / (exact @ exact)
    np.testing.assert_allclose(slope, 1, atol=0.06)


def test_gaussian_probes_of_bfloat16_leaves_have_unit_variance():
    # With a diagonal Hessian of ones the estimate is u². Drawn from 8 random bits it has another
    # fourth moment than a normal's, and takes 256 values at most.
    params = jnp.ones(65536, jnp.bfloat16)
    hessian_fn = sophia_optax.hutchinson(
        lambda x: jnp.sum(jnp.square(x.astype(jnp.float32))) / 2, params, distribution="gaussian"
    )
    squares = np.asarray(hessian_fn(jax.random.key(0)), np.float64)
    np.testing.assert_allclose(squares.mean(), 1, atol=0.03)
    np.testing.assert_allclose(np.square(squares).mean(), 3, atol=0.25)
    assert len(np.unique(squares)) > 400


# --- when it runs ---------------------------------------------------------------------------------


def test_nothing_is_computed_before_the_call():
    def loss(params):
        raise AssertionError("called")

    sophia_optax.hutchinson(loss, jnp.ones(2))


def test_it_runs_under_jit_vmap_scan_and_cond():
    loss = quadratic(symmetric(2, 3))
    keys = jax.random.split(jax.random.key(0), 4)

    def estimate(x, key):
        return sophia_optax.hutchinson(loss, x)(key)

    compiled = jax.jit(estimate)
    expected = [compiled(jnp.ones(3), key) for key in keys]
    mapped = jax.jit(jax.vmap(estimate, in_axes=(None, 0)))(jnp.ones(3), keys)
    np.testing.assert_allclose(mapped, expected, rtol=1e-5)

    def step(x, key):
        return x, jax.lax.cond(x[0] > 0, lambda: estimate(x, key), lambda: jnp.zeros(3))

    _, scanned = jax.jit(lambda: jax.lax.scan(step, jnp.ones(3), keys))()
    np.testing.assert_allclose(scanned, expected, rtol=1e-5)


def test_its_result_satisfies_the_protocol():
    hessian_fn = sophia_optax.hutchinson(lambda x: x**2, jnp.float32(1))
    assert isinstance(hessian_fn, sophia_optax.HessianFn)


def temporaries(**arguments: int) -> int:
    """Bytes of temporary memory of a compiled estimate on a model that has activations to keep."""
    x = jnp.ones((512, 32))
    params = {"layers": jnp.ones((4, 32, 32)) / 32, "out": jnp.ones((32, 8))}

    def loss(params):
        hidden, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])
        return jnp.mean(jnp.square(hidden @ params["out"]))

    hessian_fn = sophia_optax.hutchinson(loss, params, **arguments)
    compiled = jax.jit(hessian_fn).lower(jax.random.key(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_memory_of_several_probes_is_that_of_one():
    one = temporaries(num_probes=1)
    assert temporaries(num_probes=8) <= 1.2 * one
    assert temporaries(num_probes=8, probe_chunk=8) > 3 * one  # as it would be if they stacked


# --- how it fails ---------------------------------------------------------------------------------


@jax.custom_vjp
def kernel(x):
    """Σ x⁴ / 12 with derivatives computed outside of JAX, as a fused attention's are: no jvp."""
    return _outside(lambda x: np.sum(x**4, dtype=x.dtype) / np.asarray(12, x.dtype), (), x)


def _outside(function, shape, x):
    result = jax.ShapeDtypeStruct(shape, x.dtype)
    return jax.pure_callback(function, result, x, vmap_method="sequential")


def _kernel_forward(x):
    return kernel(x), x


def _kernel_backward(x, cotangent):
    return (cotangent * _outside(lambda x: x**3 / np.asarray(3, x.dtype), x.shape, x),)


kernel.defvjp(_kernel_forward, _kernel_backward)


@jax.custom_vjp
def _exponential(x):
    """Its forward rule calls itself and keeps the output: it has a vjp of a vjp but no jvp."""
    return jnp.exp(x)


def _exponential_forward(x):
    y = _exponential(x)
    return y, y


_exponential.defvjp(_exponential_forward, lambda y, cotangent: (cotangent * y,))


def self_calling(x):
    """Σ exp(2 log |x|) / 2, the Hessian of which is the identity."""
    return jnp.sum(_exponential(2 * jnp.log(jnp.abs(x)))) / 2


@pytest.mark.parametrize(
    "loss, mode",
    [
        (kernel, "forward_over_reverse"),
        (kernel, "reverse_over_reverse"),
        (self_calling, "forward_over_reverse"),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("probes", [1, 2])
def test_a_mode_that_cannot_work_says_what_can(loss, mode, compiled, probes):
    x = jnp.array([1.0, 2.0])
    jax.grad(loss)(x)
    hessian_fn = sophia_optax.hutchinson(loss, x, mode=mode, num_probes=probes)
    if compiled:  # the error comes while tracing, not when the compiler lowers what was traced
        hessian_fn = functools.partial(jax.eval_shape, hessian_fn)
    with pytest.raises(NotImplementedError) as caught:
        hessian_fn(jax.random.key(0))
    message = str(caught.value)
    assert re.search(rf"\b{mode}\b", message)
    for other in set(MODES) - {mode}:
        assert other in message
    for word in ("cuDNN", "Pallas", "plain attention", "gauss_newton_bartlett"):
        assert word in message
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    "loss, mode, expected",
    [
        (kernel, "finite_difference", [1.0, 4.0, 9.0]),
        (self_calling, "reverse_over_reverse", [1.0, 1.0, 1.0]),
        (self_calling, "finite_difference", [1.0, 1.0, 1.0]),
    ],
)
@pytest.mark.parametrize("probes", [1, 2])
def test_the_ways_out_work(loss, mode, expected, probes):
    x = jnp.array([1.0, 2.0, -3.0])
    hessian_fn = sophia_optax.hutchinson(loss, x, mode=mode, num_probes=probes)
    np.testing.assert_allclose(jax.jit(hessian_fn)(jax.random.key(0)), expected, rtol=1e-2)


@jax.custom_vjp
def differentiable_rules(x):
    """An exponential whose rules are plain JAX, which every mode differentiates."""
    return jnp.exp(x)


differentiable_rules.defvjp(
    lambda x: (jnp.exp(x), jnp.exp(x)), lambda y, cotangent: (cotangent * y,)
)


@pytest.mark.parametrize("mode", MODES)
def test_a_custom_vjp_within_a_remat_scan_is_no_obstacle_by_itself(mode):
    def layer(x, _):
        return jax.jit(differentiable_rules)(2 * jnp.log(x)), None

    def loss(x):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, None, length=1)[0]) / 2

    hessian_fn = sophia_optax.hutchinson(loss, jnp.array([1.0, 2.0]), mode=mode)
    np.testing.assert_allclose(jax.jit(hessian_fn)(jax.random.key(0)), [1, 1], rtol=1e-2)


@pytest.mark.parametrize("mode", MODES)
def test_an_error_of_the_users_own_passes_through(mode):
    x = jnp.ones(3)

    def loss(x):
        return jnp.sum(x @ jnp.ones((4, 2)))

    with pytest.raises(TypeError) as plain:
        jax.grad(loss)(x)
    with pytest.raises(TypeError) as caught:
        sophia_optax.hutchinson(loss, x, mode=mode)(jax.random.key(0))
    assert str(caught.value) == str(plain.value)


@pytest.mark.parametrize("mode", MODES)
def test_an_exception_of_the_users_own_class_passes_through(mode):
    class DataError(Exception):
        pass

    def loss(x):
        raise DataError("file 7 is missing")

    with pytest.raises(DataError, match="file 7 is missing"):
        sophia_optax.hutchinson(loss, jnp.ones(3), mode=mode)(jax.random.key(0))


@pytest.mark.parametrize("mode", MODES)
def test_a_while_loop_has_no_gradient_and_jax_says_so(mode):
    def loss(x):
        return jax.lax.while_loop(lambda c: c < 10, lambda c: c * 2, jnp.sum(x**2))

    with pytest.raises(ValueError, match="while_loop"):
        sophia_optax.hutchinson(loss, jnp.ones(3), mode=mode)(jax.random.key(0))


@pytest.mark.parametrize("mode", MODES)
def test_a_loop_of_fixed_length_has_a_hessian(mode):
    def loss(x):
        return jnp.sum(jax.lax.fori_loop(0, 2, lambda _, c: c * x, x**2)) / 12

    x = jnp.array([1.0, 2.0, -3.0])
    estimate = sophia_optax.hutchinson(loss, x, mode=mode)(jax.random.key(0))
    np.testing.assert_allclose(estimate, x**2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_finite_differences_refuse_narrow_params(dtype):
    params = {"wide": jnp.ones(2), "narrow": jnp.ones(2, dtype)}
    hessian_fn = sophia_optax.hutchinson(
        lambda p: jnp.sum(p["wide"] * p["narrow"]), params, mode="finite_difference"
    )
    with pytest.raises((TypeError, ValueError), match=r"finite_difference.*float32") as caught:
        hessian_fn(jax.random.key(0))
    assert jnp.dtype(dtype).name in str(caught.value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "loss, shape",
    [
        (lambda x: x**2, "(3,)"),
        (lambda x: jnp.sum(x, keepdims=True), "(1,)"),
        (lambda x: (jnp.sum(x**2), x), "(3,)"),
    ],
    ids=["vector", "length one", "auxiliary output"],
)
def test_a_loss_that_is_not_a_scalar(loss, shape, mode):
    with pytest.raises((TypeError, ValueError), match="scalar") as caught:
        sophia_optax.hutchinson(loss, jnp.ones(3), mode=mode)(jax.random.key(0))
    assert "loss_fn" in str(caught.value)
    assert shape in str(caught.value)


def test_complex_leaves_are_refused_by_name():
    params = {"layer": {"w": jnp.ones(2), "phase": jnp.ones(2, jnp.complex64)}}
    with pytest.raises(TypeError, match="complex64") as caught:
        sophia_optax.hutchinson(lambda p: jnp.sum(jnp.abs(p["layer"]["phase"])), params)
    assert "['layer']['phase']" in str(caught.value)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"num_probes": 0}, ValueError, ("num_probes", "0")),
        ({"num_probes": -2}, ValueError, ("num_probes", "-2")),
        ({"num_probes": 1.5}, ValueError, ("num_probes", "1.5")),
        ({"num_probes": float("nan")}, ValueError, ("num_probes", "nan")),
        ({"num_probes": "2"}, TypeError, ("num_probes", "'2'")),
        ({"num_probes": True}, TypeError, ("num_probes", "True")),
        ({"probe_chunk": 0}, ValueError, ("probe_chunk", "0")),
        ({"num_probes": 4, "probe_chunk": 3}, ValueError, ("probe_chunk", "3", "4")),
        ({"num_probes": 2, "probe_chunk": 4}, ValueError, ("probe_chunk", "4", "2")),
        ({"distribution": "normal"}, ValueError, ("distribution", "normal", "gaussian")),
        ({"mode": "reverse"}, ValueError, ("mode", "reverse", "reverse_over_reverse")),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_once(arguments, error, words):
    # The run-time type checker of the tests may come first; it raises a TypeError too, but one
    # without our words, so look at what the library says without it.
    undecorated = getattr(sophia_optax.hutchinson, "__wrapped__", sophia_optax.hutchinson)
    with pytest.raises(error) as caught:
        undecorated(lambda x: x**2, jnp.float32(1), **arguments)
    for word in words:
        assert word in str(caught.value)


def test_products_of_narrow_numbers_are_not_rounded():
    one = jnp.bfloat16(1 + 2**-7)
    assert _multiply(one, one) == (1 + 2**-7) ** 2


def test_finite_differences_step_by_the_cube_root_of_epsilon_times_the_params_scale():
    seen = []

    def gradient(theta):
        seen.append(np.asarray(theta[0], np.float64))
        return theta

    _finite_difference(gradient, [jnp.array([3.0, 4.0])], [jnp.array([1.0, -1.0])])
    step = float(jnp.finfo(jnp.float32).eps) ** (1 / 3) * (1 + 5) / 2**0.5
    np.testing.assert_allclose((seen[0] - seen[1]) / 2, [step, -step], rtol=1e-4)
