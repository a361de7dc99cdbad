"""What the library should compute, written down a second time, plainly: NumPy, float64, dense.

* Trajectories: Algorithms 1-3 of the paper, and the official PyTorch SophiaG.
* Curvature: whole Hessians and Gauss-Newton matrices of small models.
* Statistics: whether independent estimates agree with an exact value.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

Array = np.ndarray
Schedule = Callable[[int], float]
AtStep = Callable[[Array, int], Any]


# --- trajectories ---------------------------------------------------------------------------------


def sophia_trajectory(
    grads: AtStep,
    estimates: AtStep,
    params: Any,
    *,
    steps: int,
    learning_rate: float | Schedule,
    b1: float,
    b2: float,
    eps: float,
    gamma: float,
    clip_threshold: float | None,
    update_interval: int,
    weight_decay: float,
    bias_correction: bool,
) -> Array:
    """Algorithms 1-3 of the paper (arXiv 2305.14342), with t counting from 0.

    Args:
        grads: `grads(params, t)`, the gradient at step t, an array of the params' shape.
        estimates: `estimates(params, t)`, the estimate of the Hessian's diagonal at step t. Called
            at refreshes only. One that is not finite is dropped whole.
        params: The initial parameters, an array.
        steps: How many steps.
        learning_rate: A number, or a function of t.
        b1: Decay of m.
        b2: Decay of h.
        eps: Lower bound of the denominator.
        gamma: Scale of h.
        clip_threshold: Bound of |u|, or None for no bound.
        update_interval: Steps from one refresh of h to the next.
        weight_decay: Decoupled weight decay.
        bias_correction: Whether h is divided by 1 - b2 ** (number of accepted refreshes).

    Returns:
        The parameters before the first step and after each, [steps + 1, ...], float64.
    """
    theta = np.array(params, np.float64)
    m = np.zeros_like(theta)
    h = np.zeros_like(theta)
    refreshes = 0
    trajectory = [theta]
    for t in range(steps):
        eta = learning_rate(t) if callable(learning_rate) else learning_rate
        m = b1 * m + (1 - b1) * np.asarray(grads(theta, t), np.float64)
        if t % update_interval == 0:
            estimate = np.asarray(estimates(theta, t), np.float64)
            if np.all(np.isfinite(estimate)):
                h = b2 * h + (1 - b2) * estimate
                refreshes += 1
        corrected = h / (1 - b2**refreshes) if bias_correction and refreshes else h
        u = m / np.maximum(gamma * corrected, eps)
        if clip_threshold is not None:
            u = np.clip(u, -clip_threshold, clip_threshold)
        theta = theta - eta * (u + weight_decay * theta)
        trajectory.append(theta)
    return np.stack(trajectory)


def official_sophiag_trajectory(
    grads: AtStep,
    sampled_grads: AtStep,
    params: Any,
    *,
    steps: int,
    learning_rate: float | Schedule,
    b1: float,
    b2: float,
    rho: float,
    batch_size: float,
    update_interval: int,
    weight_decay: float,
) -> Array:
    """The official PyTorch SophiaG: h is refreshed at the end of a step, so used one step later.

    Args:
        grads: `grads(params, t)`, the gradient at step t, an array of the params' shape.
        sampled_grads: `sampled_grads(params, t)`, the gradient of the mean loss on labels sampled
            from the model. Called at the end of step t, on the params that the step has made, where
            t is one less than a multiple of `update_interval`.
        params: The initial parameters, an array.
        steps: How many steps.
        learning_rate: A number, or a function of t.
        b1: Decay of m.
        b2: Decay of h.
        rho: Their name for gamma.
        batch_size: Predictions in a batch, which they multiply h by when they use it.
        update_interval: Steps from one refresh of h to the next.
        weight_decay: Decoupled weight decay.

    Returns:
        The parameters before the first step and after each, [steps + 1, ...], float64.
    """
    p = np.array(params, np.float64)
    m = np.zeros_like(p)
    h = np.zeros_like(p)
    trajectory = [p]
    for t in range(steps):
        lr = learning_rate(t) if callable(learning_rate) else learning_rate
        gradient = np.asarray(grads(p, t), np.float64)
        p = p * (1 - lr * weight_decay)
        m = b1 * m + (1 - b1) * gradient
        ratio = np.minimum(np.abs(m) / (rho * batch_size * h + 1e-15), 1)
        p = p - lr * np.sign(m) * ratio
        trajectory.append(p)
        if t % update_interval == update_interval - 1:
            sampled = np.asarray(sampled_grads(p, t), np.float64)
            h = b2 * h + (1 - b2) * sampled**2
    return np.stack(trajectory)


# --- dense curvature ------------------------------------------------------------------------------


# What the tests compile they run once or twice, so that compiling quickly is worth more.
_QUICK = {"xla_backend_optimization_level": 0}


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` that compiles in half of the time, to code that is slower."""
    return jax.jit(function, compiler_options=_QUICK)


class Flat(NamedTuple):
    """The floating point leaves of a tree as one float64 vector, and the ways back."""

    vector: Array
    rebuild: Callable[[jax.Array], Any]
    unflatten: Callable[[Array], Any]


def flatten(tree: Any) -> Flat:
    """Ravels the floating point leaves of a tree.

    Args:
        tree: Any tree of arrays.

    Returns:
        `vector`; `rebuild`, from such a vector (jax, traced or not, of any precision) to the tree,
        with the other leaves as they were; `unflatten`, from such a NumPy vector to a tree of NumPy
        arrays, with zeros in the other leaves.
    """
    leaves, treedef = jax.tree.flatten(tree)
    inexact = [bool(jnp.issubdtype(jnp.result_type(x), jnp.inexact)) for x in leaves]
    sizes = [np.size(x) if f else 0 for x, f in zip(leaves, inexact, strict=True)]
    stops = np.cumsum(sizes)

    def pieces(vector: Any) -> list[Any]:
        return [
            vector[stop - size : stop].reshape(np.shape(x))
            for x, size, stop in zip(leaves, sizes, stops, strict=True)
        ]

    def parts(vector: Any, others: list[Any]) -> Any:
        chosen = [
            vector[stop - size : stop].reshape(np.shape(x)) if f else other
            for x, f, size, stop, other in zip(leaves, inexact, sizes, stops, others, strict=True)
        ]
        return treedef.unflatten(chosen)

    flat = [np.ravel(np.asarray(x, np.float64)) for x, f in zip(leaves, inexact, strict=True) if f]
    return Flat(
        vector=np.concatenate([np.zeros(0), *flat]),
        rebuild=lambda vector: parts(vector, leaves),
        unflatten=lambda vector: parts(vector, [np.zeros(np.shape(x)) for x in leaves]),
    )


def ravel(tree: Any) -> Array:
    """Concatenates all leaves of a tree, float64."""
    leaves = [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]
    return np.concatenate([np.zeros(0), *leaves])


def hessian(loss: Callable[[Any], Any], params: Any) -> Array:
    """The whole Hessian of a loss in the floating point leaves, taken and returned in float64.

    Args:
        loss: Params to a scalar. What it closes over may be of lower precision.
        params: A tree; its floating point leaves are handed to `loss` in float64.

    Returns:
        [n, n], in the order of `flatten`.
    """
    flat = flatten(params)
    with jax.enable_x64(True):
        matrix = jit(jax.hessian(lambda v: loss(flat.rebuild(v))))(flat.vector)
        return np.asarray(matrix, np.float64)


def hessian_diagonal(loss: Callable[[Any], Any], params: Any) -> Any:
    """The diagonal of `hessian`, as a tree like the params; zeros in integer leaves."""
    return flatten(params).unflatten(np.diagonal(hessian(loss, params)))


def softmax_hessian(logits: Array) -> Array:
    """The Hessian of -log softmax(z)[y] in z, [..., V] -> [..., V, V]: diag(p) - p pᵀ."""
    p = scipy.special.softmax(np.asarray(logits, np.float64), axis=-1)
    return np.eye(p.shape[-1]) * p[..., None, :] - p[..., :, None] * p[..., None, :]


def sigmoid_hessian(logits: Array) -> Array:
    """The second derivative of -log p(y) for y ~ Bernoulli(sigmoid(z)), [...]: p (1 - p)."""
    p = scipy.special.expit(np.asarray(logits, np.float64))
    return p * (1 - p)


def gaussian_hessian(means: Array) -> Array:
    """The second derivative of (z - y)² / 2 in z, [...]: one."""
    return np.ones_like(np.asarray(means, np.float64))


def poisson_hessian(log_rates: Array) -> Array:
    """The second derivative of exp(z) - y z in z, [...]: the rate."""
    return np.exp(np.asarray(log_rates, np.float64))


OUTPUT_HESSIANS: dict[str, Callable[[Array], Array]] = {
    "categorical": softmax_hessian,
    "bernoulli": sigmoid_hessian,
    "gaussian": gaussian_hessian,
    "poisson": poisson_hessian,
}


def gauss_newton(
    outputs_fn: Callable[[Any], Any], params: Any, likelihood: str, weights: Any = None
) -> Array:
    """The Gauss-Newton matrix Σ_i (w_i / Σw) J_iᵀ H_i J_i of a weighted mean loss, float64.

    Args:
        outputs_fn: Params to outputs, [predictions..., V] for "categorical", else [predictions...].
        params: A tree; its floating point leaves are handed to `outputs_fn` in float64.
        likelihood: A key of `OUTPUT_HESSIANS`.
        weights: Non-negative, broadcast against the predictions; None weighs all alike.

    Returns:
        [n, n], in the order of `flatten`.
    """
    flat = flatten(params)
    with jax.enable_x64(True):

        def on_vector(vector: jax.Array) -> jax.Array:
            return outputs_fn(flat.rebuild(vector))

        outputs = np.asarray(jit(on_vector)(flat.vector), np.float64)
        jacobian = np.asarray(jit(jax.jacrev(on_vector))(flat.vector), np.float64)
    output_hessian = OUTPUT_HESSIANS[likelihood](outputs)
    events = outputs.shape[-1] if likelihood == "categorical" else 1
    predictions = outputs.shape[:-1] if likelihood == "categorical" else outputs.shape
    w = np.broadcast_to(np.asarray(1.0 if weights is None else weights, np.float64), predictions)
    n = flat.vector.size
    return np.einsum(
        "i,ian,iab,ibm->nm",
        w.ravel() / w.sum(),
        jacobian.reshape(w.size, events, n),
        output_hessian.reshape(w.size, events, events),
        jacobian.reshape(w.size, events, n),
    )


def gauss_newton_diagonal(
    outputs_fn: Callable[[Any], Any], params: Any, likelihood: str, weights: Any = None
) -> Any:
    """The diagonal of `gauss_newton`, as a tree like the params; zeros in integer leaves."""
    matrix = gauss_newton(outputs_fn, params, likelihood, weights)
    return flatten(params).unflatten(np.diagonal(matrix))


# --- statistics -----------------------------------------------------------------------------------


def many(hessian_fn: Callable[[jax.Array], Any], seed: int, n: int) -> Array:
    """Draws n independent estimates in one compiled call.

    Args:
        hessian_fn: From a key to a tree.
        seed: Of the keys.
        n: How many.

    Returns:
        [n, d] float64: a row an estimate, all of its leaves raveled.
    """
    keys = jax.random.split(jax.random.key(seed), n)
    tree = jit(jax.vmap(hessian_fn))(keys)
    columns = [np.asarray(x, np.float64).reshape(n, -1) for x in jax.tree.leaves(tree)]
    return np.concatenate(columns, axis=1)


def assert_unbiased(samples: Array, exact: Any, *, level: float = 1e-6) -> None:
    """Asserts that independent samples have the given mean, and that a wrong one would show.

    Four statements, each failing with probability about `level` on unbiased samples:

    1. every coordinate's mean is within a Bonferroni bound on its z-score;
    2. Σ z² is not too large for a sum of squares of normals with the samples' own correlations
       (a chi-square scaled to its mean and variance);
    3. the regression of the means on the exact values has slope 1;
    4. that slope is known to 5 %, so that an error by a factor of 2 (or B, or 1/B) is many standard
       errors away. Without it the first three would pass on noise.

    Args:
        samples: [n, d], a row a sample.
        exact: d numbers, or a tree of them.
        level: The probability of a false alarm for each statement.

    Raises:
        AssertionError: If one of the statements is false.
    """
    samples = np.asarray(samples, np.float64)
    exact = ravel(exact)
    n, d = samples.shape
    assert exact.shape == (d,), f"{d} coordinates against {exact.shape}"
    assert np.all(np.isfinite(samples)), "a sample is not finite"
    assert np.any(exact), "nothing to compare with: the exact values are all zero"
    scale = np.abs(exact).max()
    errors = samples.mean(axis=0) - exact
    spread = samples.std(axis=0, ddof=1)

    noisy = spread > 1e-5 * scale
    np.testing.assert_allclose(errors[~noisy], 0, atol=1e-4 * scale, err_msg="constant coordinates")
    if noisy.any():
        z = errors[noisy] / (spread[noisy] / math.sqrt(n))
        bound = -scipy.special.ndtri(level / (2 * z.size))
        worst = int(np.argmax(np.abs(z)))
        where = int(np.flatnonzero(noisy)[worst])
        assert abs(z[worst]) <= bound, (
            f"coordinate {where}: mean {samples[:, where].mean():.4g}, exact {exact[where]:.4g}, "
            f"z = {z[worst]:.1f}, bound {bound:.1f}"
        )
        correlations = np.atleast_2d(np.corrcoef(samples[:, noisy], rowvar=False))
        variance_ratio = np.sum(correlations**2) / z.size
        bound = variance_ratio * scipy.special.chdtri(z.size / variance_ratio, level)
        assert np.sum(z**2) <= bound, f"Σ z² = {np.sum(z**2):.1f} over {z.size}, bound {bound:.1f}"

    slopes = samples @ exact / (exact @ exact)
    error = float(slopes.std(ddof=1) / math.sqrt(n))
    assert error <= 0.05, f"{n} samples tell the scale to {error:.1%} only, draw more"
    bound = -scipy.special.ndtri(level / 2) * error + 1e-4
    assert abs(slopes.mean() - 1) <= bound, (
        f"the mean is {slopes.mean():.4f} times the exact value, standard error {error:.4f}"
    )


def assert_rejects_a_factor(samples: Array, exact: Any, *factors: float) -> None:
    """Asserts that `assert_unbiased`, which passes on these samples, would see a wrong factor.

    Args:
        samples: [n, d], a row a sample.
        exact: d numbers, or a tree of them.
        *factors: What the samples are multiplied by; each must make `assert_unbiased` fail.

    Raises:
        AssertionError: If a factor goes unseen.
    """
    for factor in factors:
        try:
            assert_unbiased(samples * factor, exact)
        except AssertionError:
            continue
        raise AssertionError(f"a factor of {factor} goes unseen")


def variance_ratios(samples: Array, variances: Any, *, floor: float = 0.0) -> Array:
    """Sample variances over exact ones, for the coordinates whose exact variance exceeds a floor.

    Args:
        samples: [n, d], a row a sample.
        variances: d exact variances.
        floor: A share of the largest variance; coordinates below it are left out.

    Returns:
        The ratios.
    """
    variances = ravel(variances)
    chosen = variances > floor * variances.max()
    return np.asarray(samples, np.float64).var(axis=0, ddof=1)[chosen] / variances[chosen]
