"""Gauss-Newton-Bartlett of models with several outputs, and of outputs that come in chunks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

import sophia_optax
from tests import oracles

rng = np.random.default_rng(0)
STATES = rng.normal(size=(6, 3)).astype(np.float32)
PARAMS = {
    "trunk": rng.normal(size=(3, 2)).astype(np.float32),
    "policy": rng.normal(size=(2, 4)).astype(np.float32),
    "value": rng.normal(size=2).astype(np.float32),
}
MASK = np.array([1, 1, 0, 1, 0, 1], np.float32)
IMPORTANCE = np.array([0.2, 0.0, 1.0, 3.0, 0.5, 0.5], np.float32)
VALUE_WEIGHT = 0.5
LIKELIHOODS = {"policy": sophia_optax.categorical, "value": sophia_optax.gaussian}
each_sampling = pytest.mark.parametrize("sampling", ["labels", "curvature_propagation"])


def policy(params: Any, hidden: Any) -> Any:
    return hidden @ params["policy"]


def value(params: Any, hidden: Any) -> Any:
    """Times the root of the weight that its mean has in the loss."""
    return VALUE_WEIGHT**0.5 * (hidden @ params["value"])


def trunk(params: Any) -> Any:
    return jnp.tanh(STATES @ params["trunk"])


def heads(params: Any, hidden: Any) -> Any:
    return {"policy": policy(params, hidden), "value": value(params, hidden)}


def outputs(params: Any) -> Any:
    return heads(params, trunk(params))


def exact(weights: Any) -> np.ndarray:
    """The diagonal of the sum of both means."""
    means = (
        oracles.gauss_newton_diagonal(
            lambda params, name=name: outputs(params)[name],
            PARAMS,
            kind,
            None if weights is None else w,
        )
        for name, kind, w in (("policy", "categorical", MASK), ("value", "gaussian", IMPORTANCE))
    )
    return sum(map(oracles.ravel, means))


@each_sampling
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("weights", [None, {"policy": MASK, "value": IMPORTANCE}])
def test_two_heads_with_a_likelihood_and_weights_each_have_the_curvature_of_the_sum(
    weights: Any, chunk: int | None, sampling: Any
) -> None:
    params = jax.tree.map(jnp.asarray, PARAMS)
    hessian_fn = sophia_optax.gauss_newton_bartlett(
        outputs if chunk is None else trunk,
        params,
        likelihood=LIKELIHOODS,
        weights=weights,
        sampling=sampling,
        head_fn=None if chunk is None else heads,
        head_chunk=chunk,
    )
    oracles.assert_unbiased(oracles.many(hessian_fn, seed=1, n=16384), exact(weights))


def test_one_head_may_be_weighted_and_another_not() -> None:
    def estimate(weights: Any) -> Any:
        hessian_fn = sophia_optax.gauss_newton_bartlett(
            outputs, PARAMS, likelihood=LIKELIHOODS, weights=weights
        )
        return hessian_fn(jax.random.key(0))

    of_none = estimate({"policy": MASK, "value": None})
    of_ones = estimate({"policy": MASK, "value": np.ones(6)})
    jax.tree.map(np.testing.assert_array_equal, of_none, of_ones)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_parts_of_the_hidden_activations_follow_each_other_in_order(chunk: int) -> None:
    """With a parameter to each prediction the curvature of each is in its own place."""
    scales = jnp.arange(1.0, 7.0)
    hessian_fn = sophia_optax.gauss_newton_bartlett(
        lambda params: params * scales,
        jnp.ones(6),
        likelihood=sophia_optax.gaussian,
        weights=IMPORTANCE,
        sampling="curvature_propagation",
        head_fn=lambda params, hidden: hidden,
        head_chunk=chunk,
    )
    expected = np.asarray(scales) ** 2 * IMPORTANCE / IMPORTANCE.sum()
    np.testing.assert_allclose(hessian_fn(jax.random.key(0)), expected, rtol=1e-6)


@pytest.mark.parametrize("weights", [None, 3.0, np.full(1, 3.0)], ids=str)
def test_a_weight_for_all_is_one_for_the_predictions_of_every_part(weights: Any) -> None:
    estimate = in_parts(lambda params, part: part, 2, weights=weights)
    np.testing.assert_allclose(estimate, 1 / 6, rtol=1e-6)


@pytest.mark.parametrize(
    "head_fn, head_chunk, error, words",
    [
        (lambda w, part: part, None, ValueError, "head_chunk is None"),
        (None, 2, ValueError, "head_fn is None"),
        (lambda w, part: part, 0, ValueError, "head_chunk is 0"),
        (lambda w, part: part, 4, ValueError, r"head_chunk is 4.*\(6,\)"),
        (lambda w, part: part[:1], 2, ValueError, r"shape \(1,\) for a part of 2"),
    ],
)
def test_heads_and_chunks_that_do_not_fit_are_refused(
    head_fn: Any, head_chunk: int | None, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        in_parts(head_fn, head_chunk)


def test_the_head_takes_one_array() -> None:
    with pytest.raises(TypeError, match=r"not one array. With head_fn"):
        in_parts(lambda params, part: part, 2, outputs_fn=lambda params: (params, params))


def in_parts(
    head_fn: Any, chunk: int | None, outputs_fn: Any = lambda params: params, **arguments: Any
) -> Any:
    """Exact for all keys: a prediction has one parameter, and a sign its own square."""
    return sophia_optax.gauss_newton_bartlett(
        outputs_fn,
        jnp.ones(6),
        likelihood=sophia_optax.gaussian,
        sampling="curvature_propagation",
        head_fn=head_fn,
        head_chunk=chunk,
        **arguments,
    )(jax.random.key(0))


@pytest.mark.parametrize(
    "weights",
    [
        np.array([1, -0.5, 1, 1, 1, 1]),
        [1, 1, 1, 1, 1, -1],
        -1.0,
        {"policy": MASK, "value": -IMPORTANCE},
        jnp.asarray(-MASK, jnp.bfloat16),
    ],
    ids=["numpy", "list", "number", "one head", "bfloat16"],
)
@pytest.mark.parametrize("jitted", [False, True])
def test_negative_weights_that_can_be_seen_are_refused(weights: Any, jitted: bool) -> None:
    """Inside of `jit` too, where the weights are a constant of the program."""
    by_head = isinstance(weights, dict)

    def estimator() -> Any:
        sophia_optax.gauss_newton_bartlett(
            outputs if by_head else lambda params: outputs(params)["policy"],
            PARAMS,
            likelihood=LIKELIHOODS if by_head else sophia_optax.categorical,
            weights=np.asarray(weights) if isinstance(weights, list) else weights,
        )
        return 0

    with pytest.raises(ValueError, match=r"weights hold -.*at least 0"):
        (jax.jit(estimator) if jitted else estimator)()


def test_negative_weights_that_are_traced_are_not_looked_at() -> None:
    def estimate(weights: jax.Array) -> Any:
        return sophia_optax.gauss_newton_bartlett(
            lambda params: outputs(params)["policy"], PARAMS, weights=weights
        )(jax.random.key(0))

    jax.eval_shape(estimate, -MASK)


# --- functions without a batching rule ------------------------------------------------------------

twice_p = Primitive("twice")
twice_p.def_abstract_eval(lambda x: x)
ad.deflinear(twice_p, lambda cotangent: [twice_p.bind(cotangent)])
mlir.register_lowering(twice_p, mlir.lower_fun(lambda x: 2 * x, multiple_results=False))

SCALES = jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)


def twice(params: jax.Array) -> jax.Array:
    """A kernel that can be differentiated as often as one likes, and not batched."""
    return jnp.tanh(jnp.asarray(STATES) @ twice_p.bind(params))


def loss_of_twice(params: jax.Array) -> jax.Array:
    return jnp.mean(twice(params) ** 2)


DRAWS: dict[str, Any] = {
    "probes": lambda n: sophia_optax.hutchinson(loss_of_twice, SCALES, num_probes=n, probe_chunk=1),
    "samples": lambda n: sophia_optax.gauss_newton_bartlett(
        twice, SCALES, likelihood=sophia_optax.gaussian, num_samples=n
    ),
}


@pytest.mark.parametrize("name", DRAWS)
def test_several_draws_one_by_one_need_no_batching_rule(name: str) -> None:
    """As with custom kernels; they are the mean of single draws."""
    key = jax.random.key(3)
    found, single = jax.jit(DRAWS[name](2))(key), jax.jit(DRAWS[name](1))
    singles = [single(k) for k in jax.random.split(key, 2)]
    np.testing.assert_allclose(found, sum(singles) / 2, rtol=1e-5, atol=1e-7)
    with pytest.raises(NotImplementedError, match="twice"):
        jax.vmap(twice)(SCALES[None])
