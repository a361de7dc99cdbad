"""Small models as data: parameters, outputs, targets, weights. Small enough for dense curvature.

Nothing here fixes a precision: the outputs are computed in whatever the parameters come in.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = Any


def nll(likelihood: str, outputs: Any, targets: Any) -> jax.Array:
    """-log p(target | output) of each prediction, up to a constant.

    Args:
        likelihood: "categorical", "bernoulli", "gaussian" or "poisson".
        outputs: [..., V] for "categorical", else [...].
        targets: [...].

    Returns:
        [...].
    """
    if likelihood == "categorical":
        chosen = jnp.take_along_axis(outputs, targets[..., None], axis=-1)[..., 0]
        return jax.scipy.special.logsumexp(outputs, axis=-1) - chosen
    if likelihood == "bernoulli":
        return jnp.logaddexp(0, outputs) - targets * outputs
    if likelihood == "gaussian":
        return jnp.square(outputs - targets) / 2
    if likelihood == "poisson":
        return jnp.exp(outputs) - targets * outputs
    raise ValueError(likelihood)


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A model on its data.

    Attributes:
        name: What the tests call it.
        params: A tree of float32 NumPy arrays.
        outputs: Params to outputs.
        likelihood: Name of the `sophia_optax` likelihood.
        targets: What the loss compares the outputs with.
        weights: Of the predictions in the loss, with their axes, or None.
    """

    name: str
    params: Params
    outputs: Callable[[Params], jax.Array]
    likelihood: str
    targets: np.ndarray
    weights: np.ndarray | None = None

    def loss(self, params: Params) -> jax.Array:
        """The weighted mean negative log-likelihood."""
        losses = nll(self.likelihood, self.outputs(params), self.targets)
        if self.weights is None:
            return jnp.mean(losses)
        weights = jnp.broadcast_to(jnp.asarray(self.weights, losses.dtype), losses.shape)
        return jnp.sum(weights * losses) / jnp.sum(weights)

    def predictions(self) -> int:
        """How many predictions have a weight."""
        if self.weights is None:
            return self.targets.size
        return int(np.count_nonzero(np.broadcast_to(self.weights, self.targets.shape)))

    def __repr__(self) -> str:
        return self.name


def cast(tree: Params, dtype: Any) -> Params:
    """A tree of jax arrays of a dtype."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def _normals(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _mlp(
    name: str,
    likelihood: str,
    leading: tuple[int, ...],
    outputs: int,
    weights: np.ndarray | None,
) -> Network:
    x, w1, b1, w2, b2 = _normals(1, (*leading, 3), (3, 4), (4,), (4, outputs), (outputs,))
    rng = np.random.default_rng(2)
    shape = (*leading, outputs)
    targets = {
        "categorical": lambda: rng.integers(outputs, size=leading),
        "bernoulli": lambda: rng.integers(2, size=shape),
        "gaussian": lambda: rng.normal(size=shape).astype(np.float32),
    }[likelihood]()

    def forward(params: Params) -> jax.Array:
        hidden = jnp.tanh(x.astype(params["in"]["w"].dtype) @ params["in"]["w"] + params["in"]["b"])
        return hidden @ params["out"]["w"] + params["out"]["b"]

    params = {"in": {"w": w1, "b": b1}, "out": {"w": w2, "b": b2}}
    return Network(name, params, forward, likelihood, targets, weights)


MLP_CATEGORICAL = _mlp("mlp_categorical", "categorical", (6,), 4, None)
MLP_BERNOULLI = _mlp(
    "mlp_bernoulli", "bernoulli", (2, 3), 2, np.array([[[1.0], [0.0], [3.0]]], np.float32)
)
MLP_GAUSSIAN = _mlp("mlp_gaussian", "gaussian", (6,), 2, None)


def _recurrent() -> Network:
    vocabulary, width, batch, time = 5, 3, 3, 4
    embedding, w, readout = _normals(3, (vocabulary, width), (width, width), (width, vocabulary))
    rng = np.random.default_rng(4)
    tokens = rng.integers(vocabulary, size=(batch, time + 1))
    mask = np.ones((batch, time), np.float32)
    mask[0, 2:] = 0
    mask[2, 3:] = 0

    def forward(params: Params) -> jax.Array:
        inputs = jnp.asarray(params["embedding"])[tokens[:, :-1]]

        def step(state: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            state = jnp.tanh(state @ params["w"] + x)
            return state, state @ params["readout"]

        _, logits = jax.lax.scan(step, jnp.zeros_like(inputs[:, 0]), jnp.swapaxes(inputs, 0, 1))
        return jnp.swapaxes(logits, 0, 1)

    params = {"embedding": embedding, "w": w / 2, "readout": readout}
    return Network("recurrent", params, forward, "categorical", tokens[:, 1:], mask)


RECURRENT = _recurrent()


def _stacked() -> Network:
    vocabulary, width, depth, batch, time = 5, 3, 2, 2, 3
    embedding, w, b = _normals(5, (vocabulary, width), (depth, width, width), (depth, width))
    rng = np.random.default_rng(6)
    tokens = rng.integers(vocabulary, size=(batch, time + 1))
    weights = np.array([[1.0, 0.5, 2.0], [0.0, 1.0, 1.5]], np.float32)

    def forward(params: Params) -> jax.Array:
        def layer(x: jax.Array, layer_params: Params) -> tuple[jax.Array, None]:
            w, b = layer_params
            return x + jnp.tanh(x @ w + b), None

        table = jnp.asarray(params["embedding"])
        x, _ = jax.lax.scan(jax.checkpoint(layer), table[tokens[:, :-1]], params["layers"])
        return x @ table.T

    params = {"embedding": embedding, "layers": (w / 2, b)}
    return Network("stacked", params, forward, "categorical", tokens[:, 1:], weights)


STACKED = _stacked()

NETWORKS = (MLP_CATEGORICAL, MLP_BERNOULLI, MLP_GAUSSIAN, RECURRENT, STACKED)
