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

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from sophia_optax import _arrays, _checks, _manual_axes, _trees
from sophia_optax._likelihoods import categorical
from sophia_optax._manual_axes import AxisName
from sophia_optax._types import Coordinates, HeadFn, HessianFn, Likelihood, OutputsFn, Params

Sampling: TypeAlias = Literal["labels", "curvature_propagation"]


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
      TypeError: if a parameter is complex.
      ValueError: if a number is out of its range, a name is unknown, a weight is negative (where it
        is not traced), or one of `head_fn` and `head_chunk` is missing.
    """
    _checks.check_count("num_samples", num_samples)
    _checks.check_choice("sampling", sampling, ("labels", "curvature_propagation"))
    _check_head(head_fn, head_chunk)
    outputs = _Outputs.of(likelihood, weights, sampling)
    theta = _trees.differentiable(params)
    axes_named = _manual_axes.names(axis_name)

    def hessian_fn(key: PRNGKeyArray, /, *, coordinates: Coordinates | None = None) -> Params:
        if not theta.leaves:
            return theta.fill([])
        if head_fn is None or head_chunk is None:
            backward = _whole(outputs, outputs_fn, theta)
        else:
            backward = _in_chunks(outputs, outputs_fn, head_fn, head_chunk, theta)
        axes = tuple(sorted({*axes_named, *_manual_axes.varying(backward.on_shards)}))
        to_sum = [axis for axis in axes_named if not _manual_axes.is_tracked(axis)]
        sums = outputs.sums_of_weights(backward.shapes, axes)
        scale = _scale_of_a_gradient(outputs, backward.shapes, theta.leaves)

        def one_sample(key: PRNGKeyArray) -> list[Array]:
            g = backward.gradient(_manual_axes.fold_in_position(key, axes), sums, scale)
            g = [_manual_axes.total(leaf, to_sum) for leaf in g]
            g = [_arrays.widen(leaf) / scale for leaf in _trees.turned(theta, coordinates, g)]
            return [jnp.square(leaf) for leaf in g]

        return theta.fill(_arrays.mean_over_keys(one_sample, key, num_samples))

    return hessian_fn


class _Outputs(NamedTuple):
    """What is known of the outputs beforehand: likelihood and weights of each array.

    Attributes:
      treedef: their structure.
      likelihoods: one for each array.
      weights: one for each array.
      sampling: how residuals are drawn.
    """

    treedef: Any
    likelihoods: list[Likelihood]
    weights: list[ArrayLike | None]
    sampling: Sampling

    @classmethod
    def of(cls, likelihood: Any, weights: Any, sampling: Sampling) -> "_Outputs":
        """Reads the arguments, each an array's or a pytree of such."""
        likelihoods, treedef = jax.tree.flatten(
            likelihood, is_leaf=lambda node: isinstance(node, Likelihood)
        )
        own: list[Any] = [None] * len(likelihoods)
        if weights is not None:
            own = _flatten_up_to("weights are", treedef, weights)
        for leaf in own:
            _check_not_negative(leaf)
        return cls(treedef, likelihoods, own, sampling)

    def arrays(self, outputs: Any) -> list[Array]:
        """The arrays of a model's outputs."""
        leaves = _flatten_up_to("outputs_fn returned", self.treedef, outputs)
        return [_array(leaf, one) for leaf, one in zip(leaves, self.likelihoods, strict=True)]

    def sums_of_weights(self, shapes: list[Any], axes: tuple[str, ...]) -> list[Any]:
        """W for each array, over all shards along some axes."""
        sums = []
        for w, shape, one in zip(self.weights, shapes, self.likelihoods, strict=True):
            fitted = _fit_weights(w, shape, one)
            predictions = math.prod(shape.shape[: len(shape.shape) - one.event_ndim])
            repeats = predictions / max(fitted.size, 1)
            sums.append(_manual_axes.total(repeats * jnp.sum(fitted), axes))
        return sums

    def cotangents(
        self, key: PRNGKeyArray, outputs: list[Array], weights: list[Any], sums: list[Any]
    ) -> list[Array]:
        """Draws √(w_i / W) r_i for every prediction, in float32 at least.

        Args:
          key: a PRNG key.
          outputs: all predictions, or a part of them.
          weights: theirs.
          sums: W of each array, parts that are not here included.

        Returns:
          Arrays like the outputs.
        """
        keys = [key] if len(outputs) == 1 else [*jax.random.split(key, len(outputs))]
        drawn = []
        for k, output, one, w, total in zip(
            keys, outputs, self.likelihoods, weights, sums, strict=True
        ):
            wide = _arrays.widen(output)
            sample = one.sample_residual if self.sampling == "labels" else one.sample_factor
            drawn.append(jnp.sqrt(_fit_weights(w, wide, one) / total) * sample(k, wide))
        return drawn


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


def _whole(outputs: _Outputs, outputs_fn: OutputsFn, theta: _trees.Differentiable) -> _Backward:
    """All predictions at once."""
    arrays, pullback = jax.vjp(
        lambda leaves: outputs.arrays(outputs_fn(theta.rebuild(leaves))), theta.leaves
    )

    def gradient(key: PRNGKeyArray, sums: list[Any], scale: float) -> list[Array]:
        drawn = outputs.cotangents(key, arrays, outputs.weights, sums)
        return pullback(_scaled_like(drawn, scale, arrays))[0]

    return _Backward(arrays, arrays, gradient)


def _in_chunks(
    outputs: _Outputs,
    outputs_fn: OutputsFn,
    head_fn: HeadFn,
    size: int,
    theta: _trees.Differentiable,
) -> _Backward:
    """The head on one part of the predictions after the other, so that one part's outputs exist."""
    hidden, pullback = jax.vjp(
        lambda leaves: _hidden(outputs_fn(theta.rebuild(leaves)), size), theta.leaves
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
        return outputs.arrays(head_fn(theta.rebuild(leaves), part))

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
        _fit_weights(w, shape, one)
    weight_parts = [split_weights(w) for w in outputs.weights]

    def gradient(key: PRNGKeyArray, sums: list[Any], scale: float) -> list[Array]:
        def add(total: list[Array], chunk: Any) -> tuple[list[Array], Array]:
            key, part, weights = chunk
            arrays, pull = jax.vjp(head, local, part)
            drawn = outputs.cotangents(key, arrays, weights, sums)
            of_params, of_part = pull(_scaled_like(drawn, scale, arrays))
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


def _scaled_like(drawn: list[Array], scale: float, arrays: list[Array]) -> list[Array]:
    """Scales what was drawn, and rounds it to the dtypes of the outputs."""
    return [(scale * d).astype(a.dtype) for d, a in zip(drawn, arrays, strict=True)]


def _scale_of_a_gradient(outputs: _Outputs, shapes: list[Any], leaves: list[Array]) -> float:
    """A power of two near 1/√N, which makes cotangents as large as those of the mean loss.

    FP8 with delayed scaling remembers the gradient's range, and what is √N times larger saturates.
    float16 would lose what is that small, so there the cotangents stay √N times larger.

    Args:
      outputs: the outputs' likelihoods.
      shapes: the outputs' shapes and dtypes.
      leaves: the params.

    Returns:
      The scale, exactly invertible.
    """
    if any(x.dtype == jnp.float16 for x in (*shapes, *leaves)):
        return 1.0
    predictions = min(
        math.prod(shape.shape[: len(shape.shape) - one.event_ndim])
        for shape, one in zip(shapes, outputs.likelihoods, strict=True)
    )
    return 2.0 ** -round(math.log2(max(predictions, 1)) / 2)


def _flatten_up_to(subject: str, treedef: Any, tree: Any) -> list[Any]:
    """The parts of a tree that belong to the likelihoods.

    Args:
      subject: the start of the error.
      treedef: the structure of the likelihoods.
      tree: one that should have it.

    Returns:
      The parts.

    Raises:
      TypeError: if it has another structure.
    """
    try:
        return treedef.flatten_up_to(tree)
    except ValueError as error:
        raise TypeError(
            f"{subject} {jax.tree.structure(tree)}, where the likelihood is {treedef}. Give each "
            "output a likelihood, in the structure of the outputs."
        ) from error


def _check_not_negative(weights: Any) -> None:
    """Refuses negative weights, where their values can be seen.

    Args:
      weights: of one output.

    Raises:
      ValueError: if a weight is negative.
    """
    if weights is None or isinstance(weights, Tracer):
        return
    if isinstance(weights, jax.Array) and not weights.is_fully_addressable:
        return
    with jax.ensure_compile_time_eval():
        least = float(jnp.min(jnp.asarray(weights), initial=0))
    if least < 0:
        raise ValueError(
            f"weights hold {least:g}, but the curvature of a weighted mean needs weights of at "
            "least 0. Mask a prediction with 0."
        )


def _check_head(head_fn: HeadFn | None, head_chunk: int | None) -> None:
    """Checks that the head and its chunk come together.

    Args:
      head_fn: as passed.
      head_chunk: as passed.

    Raises:
      ValueError: if one of them is missing.
    """
    if (head_fn is None) != (head_chunk is None):
        missing = "head_fn" if head_fn is None else "head_chunk"
        raise ValueError(f"{missing} is None. Pass both head_fn and head_chunk, or neither.")
    if head_chunk is not None:
        _checks.check_count("head_chunk", head_chunk)


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


def _array(outputs: Any, likelihood: Likelihood) -> Float[Array, "..."]:
    """Returns the outputs as an array, and raises if they are not one."""
    if jax.tree.structure(outputs) != jax.tree.structure(0):
        raise TypeError(
            f"outputs_fn returned {jax.tree.structure(outputs)} for one likelihood, not one array. "
            "Return the outputs that the likelihood is about, e.g. "
            "lambda params: outputs_fn(params)[0], or pass a likelihood for each of them."
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


def _fit_weights(weights: ArrayLike | None, outputs: Any, likelihood: Likelihood) -> Array:
    """The weights with axes to be broadcast against the outputs.

    Args:
      weights: as passed, or a part of them.
      outputs: the outputs of these predictions, or their shape.
      likelihood: what they are the outputs of.

    Returns:
      An array of the outputs' dtype, float32 at least.

    Raises:
      ValueError: if there is no weight for each prediction.
    """
    predictions = outputs.shape[: len(outputs.shape) - likelihood.event_ndim]
    dtype = _arrays.at_least_float32(outputs.dtype)
    w = jnp.asarray(1.0 if weights is None else weights, dtype)
    if w.ndim:
        fits = w.ndim == len(predictions) and all(
            a in (1, b) for a, b in zip(w.shape, predictions, strict=True)
        )
        if not fits:
            raise ValueError(
                f"weights have shape {w.shape}, but there is a prediction for each of "
                f"{predictions}. Give them the same axes, each of full length or 1."
            )
        w = jnp.expand_dims(w, tuple(range(w.ndim, w.ndim + likelihood.event_ndim)))
    return w
