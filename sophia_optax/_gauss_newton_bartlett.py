"""The Gauss-Newton-Bartlett estimator of the diagonal of the Gauss-Newton matrix (Sophia-G).

The loss is a weighted mean of negative log-likelihoods over predictions i = 1 ... N,

    L(θ) = Σ_i (w_i / W) ℓ_i(f_i(θ)),   W = Σ_i w_i,   w_i ≥ 0,

and its Gauss-Newton matrix G = Σ_i (w_i / W) J_iᵀ H_i J_i, with J_i the Jacobian of the outputs
f_i and H_i the Hessian of ℓ_i in them. Draw for each prediction an independent vector r_i with mean
zero and covariance H_i, and pull all of them back through the outputs at once:

    g = Σ_i √(w_i / W) J_iᵀ r_i,      ĥ = g ⊙ g

It is unbiased: in E[g gᵀ] the terms of two predictions vanish, because their r are independent with
mean zero. The rest is Σ_i (w_i / W) J_iᵀ E[r_i r_iᵀ] J_i = G, whose diagonal is E[ĥ].

Sampling a label ŷ_i ~ p(· | f_i) and taking r_i = ∇ℓ_i at ŷ_i is the paper's way (Algorithm 2).
There ĥ = B ĝ ⊙ ĝ with ĝ the gradient of the mean loss on the sampled labels and B the number of
predictions: unmasked tokens, not sequences. With the square root above, B is not an argument, and
weights are not a special case.

An estimate needs one forward pass and one pullback per sample, and first derivatives only.
"""

import math
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from sophia_optax import _arrays, _checks, _trees
from sophia_optax._likelihoods import categorical
from sophia_optax._types import Coordinates, HessianFn, Likelihood, OutputsFn, Params

Sampling: TypeAlias = Literal["labels", "curvature_propagation"]


def gauss_newton_bartlett(
    outputs_fn: OutputsFn,
    params: Params,
    *,
    likelihood: Likelihood = categorical,
    weights: ArrayLike | None = None,
    num_samples: int = 1,
    sampling: Sampling = "labels",
) -> HessianFn:
    """Estimates the diagonal of the Gauss-Newton matrix from gradients on sampled labels.

    Nothing is computed until the transform calls the result, on every `update_interval`-th step.
    The estimate is never negative. It needs no labels.

    Example:
      >>> import jax, jax.numpy as jnp, sophia_optax
      >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> hessian_fn = sophia_optax.gauss_newton_bartlett(
      ...     lambda w: w * x, jnp.ones(2), likelihood=sophia_optax.gaussian,
      ...     sampling="curvature_propagation",
      ... )
      >>> print(hessian_fn(jax.random.key(0)))  # mean over 4 predictions of x², exact here
      [0.25 1.  ]

    Args:
      outputs_fn: params to the outputs of the model, on a batch that it closes over (often a part
        of the step's, see `curvature_batch`): logits `[..., V]` for `categorical`, logits `[...]`
        for `bernoulli`, means `[...]` for `gaussian`. Any number of leading axes.
      params: the whole params, a pytree with leaves of any shape. Leaves that are not floating
        point stay as they are, and their estimate is zero.
      likelihood: the likelihood whose mean negative logarithm is the loss: `categorical`,
        `bernoulli`, `gaussian` or your own `Likelihood`.
      weights: the weight of each prediction in the loss's weighted mean, non-negative; 0 for masked
        or padded tokens. It has the predictions' axes (the outputs' without the trailing
        `likelihood.event_ndim`), each of full length or 1. None weighs all equally. Only ratios
        matter. If all are zero the estimate is NaN, which the transform rejects.
      num_samples: the number of samples to average over, all from one forward pass. The variance is
        proportional to 1 / num_samples. The default, 1, is the paper's.
      sampling: "labels" (the paper's) or "curvature_propagation", see `Likelihood`.

    Returns:
      A `HessianFn`: from a PRNG key to a pytree with the structure and shapes of the params, in
      float32, or wider where a parameter is. Its unit is that of the mean loss's Hessian.

    Raises:
      TypeError: if a parameter is complex.
      ValueError: if a number is out of its range or a name is unknown.
    """
    _checks.check_count("num_samples", num_samples)
    _checks.check_choice("sampling", sampling, ("labels", "curvature_propagation"))
    sample = likelihood.sample_residual if sampling == "labels" else likelihood.sample_factor
    theta = _trees.differentiable(params)

    def hessian_fn(key: PRNGKeyArray, /, *, coordinates: Coordinates | None = None) -> Params:
        if not theta.leaves:
            return theta.fill([])
        outputs, pullback = jax.vjp(
            lambda leaves: _array(outputs_fn(theta.rebuild(leaves)), likelihood), theta.leaves
        )
        wide_outputs = outputs.astype(_arrays.at_least_float32(outputs.dtype))
        root = _root_weights(weights, wide_outputs, likelihood.event_ndim)

        def one_sample(key: PRNGKeyArray) -> list[Array]:
            cotangent = root * sample(key, wide_outputs)
            (g,) = pullback(cotangent.astype(outputs.dtype))
            g = _trees.turned(theta, coordinates, g)
            return [jnp.square(leaf.astype(_arrays.at_least_float32(leaf.dtype))) for leaf in g]

        return theta.fill(_arrays.mean_over_keys(one_sample, key, num_samples))

    return hessian_fn


def _array(outputs: Any, likelihood: Likelihood) -> Float[Array, "..."]:
    """Returns the outputs as an array, and raises if they are not one."""
    if jax.tree.structure(outputs) != jax.tree.structure(0):
        raise TypeError(
            f"outputs_fn returned {jax.tree.structure(outputs)}, not one array. Return the outputs "
            "that the likelihood is about, e.g. lambda params: outputs_fn(params)[0]."
        )
    if not jnp.issubdtype(jnp.result_type(outputs), jnp.floating):
        raise TypeError(
            f"outputs_fn returned {jnp.result_type(outputs)}, but outputs are real floating point. "
            "Return logits or means, not labels."
        )
    if jnp.ndim(outputs) < likelihood.event_ndim:
        raise ValueError(
            f"outputs_fn returned shape {jnp.shape(outputs)}, but a prediction of {likelihood!r} "
            f"has {likelihood.event_ndim} trailing axes. Return outputs with at least as many."
        )
    return jnp.asarray(outputs)


def _root_weights(
    weights: ArrayLike | None, outputs: Float[Array, "..."], event_ndim: int
) -> Float[Array, "..."]:
    """Returns √(w_i / W), to be broadcast against the outputs."""
    predictions = outputs.shape[: outputs.ndim - event_ndim]
    if weights is None:
        weights = 1.0
    w = jnp.asarray(weights, outputs.dtype)
    if w.ndim:
        fits = w.ndim == len(predictions) and all(
            a in (1, b) for a, b in zip(w.shape, predictions, strict=True)
        )
        if not fits:
            raise ValueError(
                f"weights have shape {w.shape}, but there is a prediction for each of "
                f"{predictions}. Give them the same axes, each of full length or 1."
            )
        w = jnp.expand_dims(w, tuple(range(w.ndim, w.ndim + event_ndim)))
    repeats = math.prod(predictions) / max(w.size, 1)
    return jnp.sqrt(w / (repeats * jnp.sum(w)))
