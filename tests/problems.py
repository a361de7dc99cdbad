"""Optimization targets as data: initial parameters, outputs, the loss, and what solves it.

Every loss is the mean negative log-likelihood of fixed targets under the outputs, so the same
problem serves Hutchinson (through `loss`) and Gauss-Newton-Bartlett (through `outputs`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Params = Any
Outputs = Callable[[Params], jax.Array]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One target.

    Attributes:
        name: What the tests call it.
        init: dtype -> initial parameters.
        outputs: params -> model outputs, a prediction each (categorical: a row of logits each).
        loss: params -> scalar, the mean over predictions of the negative log-likelihood.
        likelihood: Name of the `sophia_optax` likelihood that `loss` is made of.
        solution: The minimizer, where the test knows it.
        target_loss: A loss that counts as solved, where the test does not know the minimizer.
        steps: How many steps of a rate of 0.01 are plenty.
    """

    name: str
    init: Callable[[Any], Params]
    outputs: Outputs
    loss: Callable[[Params], jax.Array]
    likelihood: str
    solution: Params | None = None
    target_loss: float | None = None
    steps: int = 4000

    def __repr__(self) -> str:
        return self.name


def _cast(tree: Params, dtype: Any) -> Params:
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def _least_squares(
    name: str,
    initial: Params,
    residuals: Outputs,
    solution: Params | None = None,
    target_loss: float | None = None,
    steps: int = 4000,
) -> Problem:
    return Problem(
        name=name,
        init=lambda dtype: _cast(initial, dtype),
        outputs=residuals,
        loss=lambda params: jnp.mean(jnp.square(residuals(params))) / 2,
        likelihood="gaussian",
        solution=solution,
        target_loss=target_loss,
        steps=steps,
    )


_PARABOLA_MINIMUM = np.array([1.0, -1.0, 1.0])
_PARABOLA_SCALES = np.array([1.0, 3.0, 0.3])

PARABOLA = _least_squares(
    "parabola",
    np.array([-1.0, 4.0, 1.0]),
    lambda x: (x - _PARABOLA_MINIMUM.astype(x.dtype)) * _PARABOLA_SCALES.astype(x.dtype),
    solution=_PARABOLA_MINIMUM,
)

ROSENBROCK = _least_squares(
    "rosenbrock",
    np.array([-0.5, 1.0]),
    lambda x: jnp.stack([1 - x[0], 10 * (x[1] - jnp.square(x[0]))]),
    solution=np.array([1.0, 1.0]),
    steps=20_000,
)

_MIXED_MINIMUM = {
    "scalar": np.array(0.5),
    "vector": np.array([1.0, -1.0, 2.0]),
    "matrix": (np.array([[1.0, 0.0], [-1.0, 1.0]]),),
}

MIXED = _least_squares(
    "mixed",
    jax.tree.map(np.zeros_like, _MIXED_MINIMUM),
    lambda params: jnp.concatenate(
        [
            jnp.ravel(x - np.asarray(y, x.dtype))
            for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(_MIXED_MINIMUM), strict=True)
        ]
    ),
    solution=_MIXED_MINIMUM,
)

_rng = np.random.default_rng(0)
_REGRESSION_INPUTS = np.linspace(-2.0, 2.0, 32)[:, None]
_REGRESSION_TARGETS = np.sin(2 * _REGRESSION_INPUTS)
_REGRESSION_INIT = {
    "hidden": {"w": _rng.normal(size=(1, 8)), "b": _rng.normal(size=8) / 2},
    "out": {"w": _rng.normal(size=(8, 1)) / 3, "b": np.zeros(1)},
}


def _mlp(params: Params, inputs: jax.Array) -> jax.Array:
    hidden = jnp.tanh(inputs @ params["hidden"]["w"] + params["hidden"]["b"])
    return hidden @ params["out"]["w"] + params["out"]["b"]


def _regression_residuals(params: Params) -> jax.Array:
    dtype = params["out"]["b"].dtype
    return _mlp(params, jnp.asarray(_REGRESSION_INPUTS, dtype)) - jnp.asarray(
        _REGRESSION_TARGETS, dtype
    )


# The start is at 0.222, the best straight line through the targets at 0.211.
REGRESSION = _least_squares("regression", _REGRESSION_INIT, _regression_residuals, target_loss=0.01)

_CLASSES = 3
_CLASSIFICATION_INPUTS = _rng.normal(size=(48, 4))
_CLASSIFICATION_LABELS = np.argmax(
    _CLASSIFICATION_INPUTS @ _rng.normal(size=(4, _CLASSES)) + _rng.gumbel(size=(48, _CLASSES)), -1
)


def _classification_logits(params: Params) -> jax.Array:
    inputs = jnp.asarray(_CLASSIFICATION_INPUTS, params["w"].dtype)
    return inputs @ params["w"] + params["b"]


def _classification_loss(params: Params) -> jax.Array:
    return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(
            _classification_logits(params), _CLASSIFICATION_LABELS
        )
    )


# Convex; its minimum, found by Newton's method in float64, is 0.4967.
CLASSIFICATION = Problem(
    name="classification",
    init=lambda dtype: {
        "w": jnp.zeros((4, _CLASSES), dtype),
        "b": jnp.zeros(_CLASSES, dtype),
    },
    outputs=_classification_logits,
    loss=_classification_loss,
    likelihood="categorical",
    target_loss=0.502,
)

TARGETS = (PARABOLA, ROSENBROCK, REGRESSION, CLASSIFICATION)
