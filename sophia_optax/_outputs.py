"""The outputs of a model: a likelihood and weights for each array, and what is drawn for them."""

import math
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from sophia_optax import _arrays, _manual_axes
from sophia_optax._types import Likelihood

Sampling: TypeAlias = Literal["labels", "curvature_propagation"]


class Outputs(NamedTuple):
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
    def of(cls, likelihood: Any, weights: Any, sampling: Sampling) -> "Outputs":
        """Reads the arguments, each an array's or a pytree of such."""
        likelihoods, treedef = jax.tree.flatten(
            likelihood, is_leaf=lambda node: isinstance(node, Likelihood)
        )
        for one in likelihoods:
            _check_likelihood(one)
        own: list[Any] = [None] * len(likelihoods)
        if weights is not None:
            own = _parts("weights are", treedef, weights)
        for leaf in own:
            _check_not_negative(leaf)
        return cls(treedef, likelihoods, own, sampling)

    def arrays(self, outputs: Any) -> list[Array]:
        """The arrays of a model's outputs."""
        leaves = _parts("outputs_fn returned", self.treedef, outputs)
        return [_array(leaf, one) for leaf, one in zip(leaves, self.likelihoods, strict=True)]

    def sums_of_weights(self, shapes: list[Any], axes: tuple[str, ...]) -> list[Any]:
        """W for each array, over all shards along some axes."""
        sums = []
        for w, shape, one in zip(self.weights, shapes, self.likelihoods, strict=True):
            fitted = fit_weights(w, shape, one)
            repeats = math.prod(_prediction_axes(shape, one)) / max(fitted.size, 1)
            sums.append(_manual_axes.total(repeats * jnp.sum(fitted), axes))
        return sums

    def cotangents(
        self,
        key: PRNGKeyArray,
        outputs: list[Array],
        weights: list[Any],
        sums: list[Any],
        scale: float,
    ) -> list[Array]:
        """Draws √(w_i / W) r_i for every prediction, times the scale.

        Args:
          key: a PRNG key.
          outputs: all predictions, or a part of them.
          weights: theirs.
          sums: W of each array, parts that are not here included.
          scale: of a gradient.

        Returns:
          Arrays like the outputs, of their dtypes. They are computed in float32 at least.

        Raises:
          ValueError: if a likelihood draws an array of another shape.
        """
        keys = [key] if len(outputs) == 1 else [*jax.random.split(key, len(outputs))]
        drawn = []
        for k, output, one, w, total in zip(
            keys, outputs, self.likelihoods, weights, sums, strict=True
        ):
            wide = _arrays.widen(output)
            sample = one.sample_residual if self.sampling == "labels" else one.sample_factor
            residuals = sample(k, wide)
            if jnp.shape(residuals) != wide.shape:
                raise ValueError(
                    f"{one!r} drew an array of shape {jnp.shape(residuals)} for outputs of shape "
                    f"{wide.shape}. Let its {sample.__name__} return one like the outputs."
                )
            residuals = jnp.sqrt(fit_weights(w, wide, one) / total) * residuals
            drawn.append((scale * residuals).astype(output.dtype))
        return drawn

    def scale_of_a_gradient(self, shapes: list[Any], leaves: list[Array]) -> float:
        """A power of two near 1/√N, which makes cotangents as large as those of the mean loss.

        FP8 with delayed scaling remembers the gradient's range, and what is √N times larger
        saturates. float16 would lose what is that small, so there the cotangents stay √N times
        larger.

        Args:
          shapes: the outputs' shapes and dtypes.
          leaves: the params.

        Returns:
          The scale, exactly invertible.
        """
        if any(x.dtype == jnp.float16 for x in (*shapes, *leaves)):
            return 1.0
        predictions = min(
            math.prod(_prediction_axes(shape, one))
            for shape, one in zip(shapes, self.likelihoods, strict=True)
        )
        return 2.0 ** -round(math.log2(max(predictions, 1)) / 2)


def fit_weights(weights: ArrayLike | None, outputs: Any, likelihood: Likelihood) -> Array:
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
    predictions = _prediction_axes(outputs, likelihood)
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


def _prediction_axes(outputs: Any, likelihood: Likelihood) -> tuple[int, ...]:
    """The lengths of the outputs' axes that count predictions."""
    return outputs.shape[: len(outputs.shape) - likelihood.event_ndim]


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


def _parts(subject: str, treedef: Any, tree: Any) -> list[Any]:
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


def _check_likelihood(likelihood: Any) -> None:
    """Refuses what is no likelihood.

    Args:
      likelihood: of one output.

    Raises:
      TypeError: if it lacks a method, or is a class.
    """
    if isinstance(likelihood, type) or not isinstance(likelihood, Likelihood):
        raise TypeError(
            f"likelihood is {likelihood!r}, which is no Likelihood. Pass sophia_optax.categorical, "
            "sophia_optax.bernoulli, sophia_optax.gaussian, or an instance of a class of your own."
        )


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
