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

On several devices: where the batch is split by hand (`jax.shard_map`, `jax.pmap`), the residuals of
every shard are drawn with a key of its own, W is summed over the shards, and so is g before it is
squared. With the same key on each shard the terms of two predictions would not vanish.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, PRNGKeyArray, PyTree

from sophia_optax import _arrays, _checks, _manual_axes, _trees
from sophia_optax._likelihoods import categorical
from sophia_optax._manual_axes import AxisName
from sophia_optax._outputs import Outputs, Sampling, fit_weights
from sophia_optax._types import Coordinates, HeadFn, HessianFn, Likelihood, OutputsFn, Params


def gauss_newton_bartlett(
    outputs_fn: OutputsFn,
    params: Params,
    *,
    likelihood: Likelihood | PyTree[Likelihood] = categorical,
    weights: ArrayLike | PyTree[ArrayLike | None] | None = None,
    num_samples: int = 1,
    sampling: Sampling = "labels",
    head_fn: HeadFn | None = None,
    head_chunk: int | None = None,
    axis_name: AxisName | None = None,
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
        for `bernoulli`, means `[...]` for `gaussian`. Any number of leading axes. Or a pytree of
        such arrays, for a loss that is the sum of a mean for each.
      params: the whole params, a pytree with leaves of any shape. Leaves that are not floating
        point stay as they are, and their estimate is zero.
      likelihood: what the loss is the mean negative log-likelihood of: `categorical`, `bernoulli`,
        `gaussian` or a `Likelihood` of your own. For several outputs a pytree
        of likelihoods, in the structure of the outputs.
      weights: the weight of each prediction in the loss's weighted mean, non-negative; 0 for masked
        or padded tokens. It has the predictions' axes (the outputs' without the trailing
        `likelihood.event_ndim`), each of full length or 1. None weighs all alike. Only ratios
        matter. If all are zero, there is no mean, and the estimate is NaN, which the transform
        rejects. For several outputs a pytree of weights, in the structure of the likelihoods.
      num_samples: how many samples to average over, all from one forward pass; the variance falls
        as 1 / num_samples. The default, 1, is the paper's.
      sampling: "labels" (the paper's) or "curvature_propagation", see `Likelihood`.
      head_fn: the last layer, for a vocabulary whose logits do not fit into memory: params and a
        part of what `outputs_fn` returns, `[head_chunk, ...]`, to its outputs, `[head_chunk, ...]`.
        The parts follow each other, and only one of them is held.
      head_chunk: how many of the leading axis' entries make up a part; it divides their number.
      axis_name: the mesh axes that the batch is split over and the params are not, where jax does
        not track that: under `jax.pmap`, and in a `jax.shard_map` with `check_vma=False`.

    Returns:
      A `HessianFn`, from a PRNG key to a pytree with the structure and shapes of the params, in
      float32, or wider where a parameter is. Its unit is that of the mean loss's Hessian. In a
      `jax.shard_map` or `jax.pmap` that is the mean over the predictions of all shards.

    Raises:
      TypeError: if a parameter is complex, or an argument is of the wrong kind.
      ValueError: if a number is out of its range, a name is unknown, a weight is negative (where it
        is not traced), or one of `head_fn` and `head_chunk` is missing.
    """
    num_samples = _checks.static_count("num_samples", num_samples)
    _checks.check_choice("sampling", sampling, ("labels", "curvature_propagation"))
    head_chunk = _checked_chunk(head_fn, head_chunk)
    outputs = Outputs.of(likelihood, weights, sampling)
    theta = _trees.differentiable(params)
    axes_named = _manual_axes.names(axis_name)

    def hessian_fn(key: PRNGKeyArray, /, *, coordinates: Coordinates | None = None) -> Params:
        if not theta.leaves:
            return theta.combine_with_zeros([])
        if head_fn is None or head_chunk is None:
            backward = _whole(outputs, outputs_fn, theta)
        else:
            backward = _in_chunks(outputs, outputs_fn, head_fn, head_chunk, theta)
        axes = tuple(sorted({*axes_named, *_manual_axes.varying(backward.on_shards)}))
        to_sum = [axis for axis in axes_named if not _manual_axes.is_tracked(axis)]
        sums = outputs.sums_of_weights(backward.shapes, axes)
        scale = outputs.scale_of_a_gradient(backward.shapes, theta.leaves)

        def one_sample(key: PRNGKeyArray) -> list[Array]:
            g = backward.gradient(_manual_axes.fold_in_position(key, axes), sums, scale)
            g = [_manual_axes.total(leaf, to_sum) for leaf in g]
            g = [_arrays.widen(leaf) / scale for leaf in _trees.turned(theta, coordinates, g)]
            return [jnp.square(leaf) for leaf in g]

        return theta.combine_with_zeros(_arrays.mean_over_keys(one_sample, key, num_samples))

    return hessian_fn


class _Backward(NamedTuple):
    """A forward pass, and the gradients that can be taken of it.

    Attributes:
      on_shards: what came out; it varies over the axes that the batch is split over.
      shapes: of the outputs.
      gradient: from a key, the sums of the weights and a scale to Σ_i √(w_i / W) J_iᵀ r_i, times
        the scale, in the dtypes of the params.
    """

    on_shards: Any
    shapes: list[Any]
    gradient: Callable[[PRNGKeyArray, list[Any], float], list[Array]]


def _whole(outputs: Outputs, outputs_fn: OutputsFn, theta: _trees.Differentiable) -> _Backward:
    """All predictions at once."""
    arrays, pullback = jax.vjp(
        lambda leaves: outputs.arrays(outputs_fn(theta.combine(leaves))), theta.leaves
    )

    def gradient(key: PRNGKeyArray, sums: list[Any], scale: float) -> list[Array]:
        return pullback(outputs.cotangents(key, arrays, outputs.weights, sums, scale))[0]

    return _Backward(arrays, arrays, gradient)


def _in_chunks(
    outputs: Outputs,
    outputs_fn: OutputsFn,
    head_fn: HeadFn,
    size: int,
    theta: _trees.Differentiable,
) -> _Backward:
    """The head on one part of the predictions after the other, so that one part's outputs exist."""
    hidden, pullback = jax.vjp(
        lambda leaves: _hidden(outputs_fn(theta.combine(leaves)), size), theta.leaves
    )
    number = hidden.shape[0] // size
    # The head's gradients stay on their shard until they are summed over the parts.
    local = [_manual_axes.vary_like(leaf, hidden) for leaf in theta.leaves]

    def split(x: Array) -> Array:
        # Every number-th entry, so that a sharded axis gives each part some of every shard.
        return jnp.moveaxis(x.reshape(size, number, *x.shape[1:]), 1, 0)

    def join(parts: Array) -> Array:
        return jnp.moveaxis(parts, 0, 1).reshape(-1, *parts.shape[2:])

    def head(leaves: list[Array], part: Array) -> list[Array]:
        return outputs.arrays(head_fn(theta.combine(leaves), part))

    def entire(part: Any) -> jax.ShapeDtypeStruct:
        if part.shape[:1] != (size,):
            raise ValueError(
                f"head_fn returned shape {part.shape} for a part of {size}. Let it keep the first "
                "axis of what outputs_fn returned."
            )
        return jax.ShapeDtypeStruct((size * number, *part.shape[1:]), part.dtype)

    def split_weights(w: Any) -> Any:
        w = None if w is None else jnp.asarray(w)
        if w is None or w.ndim == 0 or w.shape[0] == 1:
            return None if w is None else jnp.stack([w] * number)
        return split(w)

    parts = split(hidden)
    shapes = [entire(part) for part in jax.eval_shape(head, local, parts[0])]
    for w, shape, one in zip(outputs.weights, shapes, outputs.likelihoods, strict=True):
        fit_weights(w, shape, one)
    weight_parts = [split_weights(w) for w in outputs.weights]

    def gradient(key: PRNGKeyArray, sums: list[Any], scale: float) -> list[Array]:
        def add(total: list[Array], chunk: Any) -> tuple[list[Array], Array]:
            key, part, weights = chunk
            arrays, pull = jax.vjp(head, local, part)
            of_params, of_part = pull(outputs.cotangents(key, arrays, weights, sums, scale))
            return [t + g for t, g in zip(total, of_params, strict=True)], of_part

        keys = jax.random.split(key, number)
        zeros = [_manual_axes.vary_like(jnp.zeros_like(leaf), leaf) for leaf in local]
        of_head, of_hidden = jax.lax.scan(add, zeros, (keys, parts, weight_parts))
        (of_rest,) = pullback(join(of_hidden))
        return [
            rest + _manual_axes.total_like(own, rest)
            for rest, own in zip(of_rest, of_head, strict=True)
        ]

    return _Backward(hidden, shapes, gradient)


def _checked_chunk(head_fn: HeadFn | None, head_chunk: int | None) -> int | None:
    """Checks that the head and its chunk come together.

    Args:
      head_fn: as passed.
      head_chunk: as passed.

    Returns:
      The chunk as an integer.

    Raises:
      ValueError: if one of them is missing.
    """
    if (head_fn is None) != (head_chunk is None):
        missing = "head_fn" if head_fn is None else "head_chunk"
        raise ValueError(f"{missing} is None. Pass both head_fn and head_chunk, or neither.")
    return None if head_chunk is None else _checks.static_count("head_chunk", head_chunk)


def _hidden(hidden: Any, size: int) -> Array:
    """Refuses what cannot be cut into parts for the head.

    Args:
      hidden: what outputs_fn returned.
      size: of a part.

    Returns:
      The same.

    Raises:
      TypeError: if it is not one array.
      ValueError: if the size does not divide its first axis.
    """
    if jax.tree.structure(hidden) != jax.tree.structure(0):
        raise TypeError(
            f"outputs_fn returned {jax.tree.structure(hidden)}, not one array. With head_fn, "
            "return the array that the head takes."
        )
    if jnp.ndim(hidden) == 0 or hidden.shape[0] % size:
        raise ValueError(
            f"head_chunk is {size}, which does not divide the first axis of what outputs_fn "
            f"returned, {jnp.shape(hidden)}. Choose a divisor."
        )
    return hidden
