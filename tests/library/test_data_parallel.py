"""A batch split over 8 devices by hand: the estimates of `shard_map` and `pmap` are those of `jit`.

The loss has a mean over unequal shares of weights, so that a mean of the shards' means is wrong.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import sophia_optax

P = PartitionSpec
SHARDS, EXAMPLES, FEATURES, CLASSES = 8, 64, 8, 5
DRAWS = 2000

X = jax.random.normal(jax.random.key(0), (EXAMPLES, FEATURES)) + 0.5
LABELS = jax.random.randint(jax.random.key(1), (EXAMPLES,), 0, CLASSES)
PARAMS = {
    "w": 0.3 * jax.random.normal(jax.random.key(2), (FEATURES, CLASSES)),
    "b": jnp.zeros(CLASSES),
}
SPECS = {"w": P("d"), "b": P()}
"""ZeRO: the rows of w are spread over the devices, b is on all of them."""


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((SHARDS,), ("d",), axis_types=(AxisType.Auto,))


def logits_fn(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["w"] + params["b"]


def gathered(shards: Any) -> Any:
    return {**shards, "w": jax.lax.all_gather(shards["w"], "d", tiled=True)}


def loss_fn(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    logits = logits_fn(params, x)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def exact() -> Any:
    """The diagonal for a linear model and cross-entropy: the Hessian's and Gauss-Newton's alike."""
    p = jax.nn.softmax(logits_fn(PARAMS, X))
    return {"w": (X**2).T @ (p * (1 - p)) / EXAMPLES, "b": (p * (1 - p)).mean(0)}


def gauss_newton(params: Any, x: jax.Array, y: jax.Array, shards: bool, **named: Any) -> Any:
    del y
    whole = gathered if shards else lambda params: params
    return sophia_optax.gauss_newton_bartlett(
        lambda params: logits_fn(whole(params), x), params, **named
    )


def gauss_newton_in_chunks(
    params: Any, x: jax.Array, y: jax.Array, shards: bool, **named: Any
) -> Any:
    del y
    whole = gathered if shards else lambda params: params
    return sophia_optax.gauss_newton_bartlett(
        lambda params: x,
        params,
        head_fn=lambda params, part: logits_fn(whole(params), part),
        head_chunk=len(x) // 2,
        **named,
    )


def hutchinson(params: Any, x: jax.Array, y: jax.Array, shards: bool, **named: Any) -> Any:
    whole = gathered if shards else lambda params: params
    named = named or {"axis_name": "d"}
    return sophia_optax.hutchinson(lambda params: loss_fn(whole(params), x, y), params, **named)


ESTIMATORS = {
    "gauss_newton_bartlett": gauss_newton,
    "gauss_newton_bartlett in chunks": gauss_newton_in_chunks,
    "hutchinson": hutchinson,
}


def in_shard_map(estimator: Any) -> Any:
    specs = {"mesh": mesh(), "in_specs": (P(), P("d"), P("d"), P()), "out_specs": P()}

    @functools.partial(jax.shard_map, **specs)
    def estimate(params: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
        return estimator(params, x, y, shards=False)(key)

    return estimate


def in_shard_map_of_shards(estimator: Any) -> Any:
    specs = {"mesh": mesh(), "in_specs": (SPECS, P("d"), P("d"), P()), "out_specs": SPECS}

    @functools.partial(jax.shard_map, **specs)
    def estimate(params: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
        return estimator(params, x, y, shards=True)(key)

    return estimate


def in_unchecked_shard_map(estimator: Any) -> Any:
    specs = {"mesh": mesh(), "in_specs": (P(), P("d"), P("d"), P()), "out_specs": P()}

    @functools.partial(jax.shard_map, **specs, check_vma=False)
    def estimate(params: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
        return estimator(params, x, y, shards=False, axis_name="d")(key)

    return estimate


def in_unchecked_shard_map_of_shards(estimator: Any) -> Any:
    """Gathers the params first, and keeps the part of the estimate that belongs to the shard."""
    specs = {"mesh": mesh(), "in_specs": (SPECS, P("d"), P("d"), P()), "out_specs": SPECS}

    @functools.partial(jax.shard_map, **specs, check_vma=False)
    def estimate(params: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
        whole = estimator(gathered(params), x, y, shards=False, axis_name="d")(key)
        rows = FEATURES // SHARDS
        first = rows * jax.lax.axis_index("d")
        return {**whole, "w": jax.lax.dynamic_slice_in_dim(whole["w"], first, rows)}

    return estimate


def in_pmap(estimator: Any) -> Any:
    def estimate(params: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
        def mine(x: jax.Array, y: jax.Array) -> Any:
            return estimator(params, x, y, shards=False, axis_name="d")(key)

        # jax.vmap with an axis name is pmap on one device.
        x, y = x.reshape(SHARDS, -1, FEATURES), y.reshape(SHARDS, -1)
        return jax.tree.map(lambda leaf: leaf[0], jax.vmap(mine, axis_name="d")(x, y))

    return estimate


STYLES = {
    "shard_map": in_shard_map,
    "shard_map, params as shards": in_shard_map_of_shards,
    "shard_map, check_vma=False": in_unchecked_shard_map,
    "shard_map, check_vma=False, params as shards": in_unchecked_shard_map_of_shards,
    "vmap with an axis name": in_pmap,
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimate_by_hand_is_unbiased_for_the_mean_loss_of_all_shards(
    name: str, style: str
) -> None:
    estimate = STYLES[style](ESTIMATORS[name])
    keys = jax.random.split(jax.random.key(7), DRAWS)
    drawn = jax.jit(lambda: jax.lax.map(lambda key: estimate(PARAMS, X, LABELS, key), keys))()
    for leaf, truth in zip(jax.tree.leaves(drawn), jax.tree.leaves(exact()), strict=True):
        draws = np.asarray(leaf, np.float64)
        error = draws.std(axis=0) / np.sqrt(DRAWS)
        z = (draws.mean(axis=0) - np.asarray(truth)) / np.maximum(error, 1e-6)
        assert np.abs(z).max() < 5
