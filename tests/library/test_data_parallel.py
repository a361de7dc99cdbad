"""A batch split over 8 devices by hand: the estimates of `shard_map` and `pmap` are those of `jit`.

The loss has a mean over unequal shares of weights, so that a mean of the shards' means is wrong.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sophia_optax
from sophia_optax import _manual_axes

P = PartitionSpec
SHARDS, EXAMPLES, FEATURES, CLASSES = 8, 64, 8, 5
DRAWS = 2000

RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(EXAMPLES, FEATURES)) + 0.5)
LABELS = RNG.integers(0, CLASSES, EXAMPLES, np.int32)
PARAMS = {
    "w": np.float32(0.3 * RNG.normal(size=(FEATURES, CLASSES))),
    "b": np.zeros(CLASSES, np.float32),
}
SPECS = {"w": P("d"), "b": P()}
"""ZeRO: the rows of w are spread over the devices, b is on all of them."""


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((SHARDS,), ("d",), axis_types=(AxisType.Auto,))


def logits_fn(params: Any, x: Any) -> Any:
    return x @ params["w"] + params["b"]


def gathered(shards: Any) -> Any:
    return {**shards, "w": jax.lax.all_gather(shards["w"], "d", tiled=True)}


def loss_fn(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    logits = logits_fn(params, x)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def exact() -> Any:
    """The diagonal for a linear model and cross-entropy: the Hessian's and Gauss-Newton's alike."""
    p = scipy.special.softmax(logits_fn(PARAMS, X), axis=1)
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
    drawn = jax.jit(jax.vmap(estimate, in_axes=(None, None, None, 0)))(PARAMS, X, LABELS, keys)
    for leaf, truth in zip(jax.tree.leaves(drawn), jax.tree.leaves(exact()), strict=True):
        draws = np.asarray(leaf, np.float64)
        error = draws.std(axis=0) / np.sqrt(DRAWS)
        z = (draws.mean(axis=0) - np.asarray(truth)) / np.maximum(error, 1e-6)
        assert np.abs(z).max() < 5


# --- the whole step -------------------------------------------------------------------------------

SCALES = np.float32(np.abs(RNG.normal(size=(EXAMPLES, FEATURES))))


def quadratic(params: Any, x: jax.Array, scales: jax.Array) -> jax.Array:
    """A loss with a diagonal Hessian, so that Hutchinson's estimate is the same for all probes."""
    of_w = jnp.sum(scales[:, :, None] * (params["w"] - x[:, :, None]) ** 2, axis=(1, 2))
    of_b = jnp.sum((params["b"] - x[:, :CLASSES]) ** 2, axis=1)
    return jnp.mean(of_w + of_b)


def step_with(tx: Any, axis_name: str | None, whole: Any, tracked: bool) -> Any:
    def loss_of(params: Any, x: jax.Array, scales: jax.Array) -> jax.Array:
        loss = quadratic(whole(params), x, scales)
        return jax.lax.pmean(loss, axis_name) if axis_name and tracked else loss

    def step(params: Any, state: Any, x: jax.Array, scales: jax.Array) -> Any:
        grads = jax.grad(loss_of)(params, x, scales)
        if axis_name and not tracked:
            grads = jax.lax.pmean(grads, axis_name)
        hessian_fn = sophia_optax.hutchinson(
            lambda params: loss_of(params, x, scales),
            params,
            axis_name=None if tracked else axis_name,
        )
        updates, state = tx.update(grads, state, params, hessian_fn=hessian_fn)
        return optax.apply_updates(params, updates), state

    return step


def same(params: Any) -> Any:
    return params


def step_in_shard_map(tx: Any, params_specs: Any, whole: Any, check_vma: bool) -> Any:
    state_specs = optax.tree.map_params(
        tx,
        lambda _, spec: spec,
        tx.init(PARAMS),
        params_specs,
        transform_non_params=lambda _: P(),
    )
    in_specs = (params_specs, state_specs, P("d"), P("d"))
    step = jax.jit(
        jax.shard_map(
            step_with(tx, "d", whole, tracked=check_vma),
            mesh=mesh(),
            in_specs=in_specs,
            out_specs=(params_specs, state_specs),
            check_vma=check_vma,
        )
    )
    # Placed here, so that the first step, from one device, is the same program as the later ones.
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh(), spec), in_specs, is_leaf=lambda x: isinstance(x, P)
    )
    return lambda *arguments: step(*jax.device_put(arguments, shardings))


def step_in_pmap(tx: Any) -> Any:
    mapped = jax.pmap(step_with(tx, "d", same, tracked=False), axis_name="d")

    def step(params: Any, state: Any, *batch: jax.Array) -> Any:
        copied = jax.tree.map(lambda leaf: np.stack([leaf] * SHARDS), (params, state))
        shards = [leaf.reshape(SHARDS, -1, *leaf.shape[1:]) for leaf in batch]
        return jax.tree.map(lambda leaf: np.asarray(leaf)[0], mapped(*copied, *shards))

    return step


WHOLE_STEPS = {
    "shard_map": lambda tx: step_in_shard_map(tx, {"w": P(), "b": P()}, same, True),
    "shard_map, params as shards": lambda tx: step_in_shard_map(tx, SPECS, gathered, True),
    "shard_map, check_vma=False": lambda tx: step_in_shard_map(
        tx, {"w": P(), "b": P()}, same, False
    ),
    "pmap": step_in_pmap,
}


def target(per_tensor: bool, weighted: bool = False) -> dict[str, Any]:
    gamma = sophia_optax.win_rate_target(0.6, per_tensor=per_tensor, weighted=weighted)
    return {"gamma": gamma}


OPTIONS: dict[str, dict[str, Any]] = {
    "a target for each tensor": target(True),
    "one target": target(False),
    "a weighted target for each tensor": target(True, weighted=True),
    "one weighted target": target(False, weighted=True),
    "signs and a limit": {
        "gamma": 0.3,
        "absolute_curvature": False,
        "max_estimate_ratio": 100.0,
    },
}


def batches(option: str) -> Any:
    """Scales of five steps: of both signs, and once absurd where w's row 5 is, for that option."""
    if option != "signs and a limit":
        return [SCALES] * 5
    signed = SCALES - np.arange(FEATURES, dtype=np.float32) / 5
    absurd = np.where(np.arange(FEATURES) == 5, 1e6 * signed, signed)
    return [signed, signed, absurd, signed, signed]


def after_batches(step: Any, tx: Any, option: str) -> Any:
    """The params and the state after the batches of an option."""
    carry = (PARAMS, tx.init(PARAMS))
    for scales in batches(option):
        carry = step(*carry, X, scales)
    return jax.device_get(carry)


def with_options(option: str) -> Any:
    return sophia_optax.sophia_h(0.05, b1=0.5, update_interval=2, **OPTIONS[option])


@functools.cache
def by_jit(option: str) -> Any:
    tx = with_options(option)
    return after_batches(jax.jit(step_with(tx, None, same, tracked=True)), tx, option)


@pytest.mark.parametrize(
    "style, option",
    [
        ("shard_map, params as shards", "one target"),
        ("shard_map, params as shards", "one weighted target"),
        ("shard_map, params as shards", "a weighted target for each tensor"),
        ("pmap", "a weighted target for each tensor"),
        *((style, "a target for each tensor") for style in WHOLE_STEPS),
        *((style, "signs and a limit") for style in WHOLE_STEPS),
    ],
)
def test_steps_by_hand_are_those_of_jit(style: str, option: str) -> None:
    """Averages, win rate and gamma too, which count the coordinates of all shards."""
    tx = with_options(option)
    found = after_batches(WHOLE_STEPS[style](tx), tx, option)
    chex.assert_trees_all_close(found, by_jit(option), rtol=1e-4, atol=1e-6)
    diagnosed = sophia_optax.diagnostics(found[1])
    assert 0 < diagnosed.win_rate < 1
    signs_and_a_limit = option == "signs and a limit"
    assert diagnosed.rejected == signs_and_a_limit
    assert np.any(optax.tree.get(found[1], "nu")["w"] < 0) == signs_and_a_limit


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("style", ["pmap", "shard_map, check_vma=False"])
def test_an_estimate_that_is_not_averaged_is_an_error_that_names_the_mean(
    name: str, style: str
) -> None:
    """With averaged gradients, each replica would step by its own curvature and drift apart."""
    tx = sophia_optax.sophia_h(0.05)

    def step(averaged: bool, params: Any, x: jax.Array, labels: jax.Array) -> Any:
        local = ESTIMATORS[name](params, x, labels, shards=False, axis_name=None)
        hessian_fn = (lambda key: jax.lax.pmean(local(key), "d")) if averaged else local
        grads = jax.lax.pmean(jax.grad(loss_fn)(params, x, labels), "d")
        return tx.update(grads, tx.init(params), params, hessian_fn=hessian_fn)

    def trace(averaged: bool) -> Any:
        mapped = functools.partial(step, averaged)
        if style == "pmap":
            x, labels = X.reshape(SHARDS, -1, FEATURES), LABELS.reshape(SHARDS, -1)
            return jax.make_jaxpr(jax.pmap(mapped, axis_name="d", in_axes=(None, 0, 0)))(
                PARAMS, x, labels
            )
        specs = {"mesh": mesh(), "in_specs": (P(), P("d"), P("d")), "out_specs": P()}
        return jax.make_jaxpr(jax.shard_map(mapped, **specs, check_vma=False))(PARAMS, X, LABELS)

    with pytest.raises(ValueError, match=r"not reduced over .*'d'.*axis_name='d'.*jax\.lax\.pmean"):
        trace(averaged=False)
    trace(averaged=True)


def test_counts_of_all_leaves_are_summed_over_the_shards_at_once() -> None:
    def sums(split: jax.Array, whole: jax.Array) -> jax.Array:
        return _manual_axes.sums_of_all_shards([whole, split, 2 * whole, 3 * split])

    specs = {"mesh": mesh(), "in_specs": (P("d"), P()), "out_specs": P()}
    mapped = jax.shard_map(sums, **specs)
    shards, whole = np.arange(2 * SHARDS), np.array([5, 7])
    found = jax.jit(mapped)(shards, whole)
    split = shards.reshape(SHARDS, 2).sum(axis=0)
    np.testing.assert_array_equal(found, [whole, split, 2 * whole, 3 * split])
    jaxpr = str(jax.make_jaxpr(mapped)(shards, whole))
    assert jaxpr.count("psum") == 1


# --- what is not of all shards --------------------------------------------------------------------


def refusal(estimator: Any, error: type[Exception]) -> str:
    """What a step in shard_map says to an estimate that each shard makes of its own data."""
    tx = sophia_optax.scale_by_sophia()

    def step(params: Any, x: jax.Array, y: jax.Array) -> Any:
        grads = jax.tree.map(jnp.zeros_like, params)
        hessian_fn = estimator(params, x, y)
        return tx.update(grads, tx.init(params), hessian_fn=hessian_fn, refresh=True)[0]

    mapped = jax.shard_map(step, mesh=mesh(), in_specs=(P(), P("d"), P("d")), out_specs=P())
    with pytest.raises(error) as caught:
        jax.eval_shape(mapped, PARAMS, X, LABELS)
    return str(caught.value)


def of_own_loss(params: Any, x: jax.Array, y: jax.Array) -> Any:
    return sophia_optax.hutchinson(lambda params: loss_fn(params, x, y), params)


def of_own_examples(params: Any, x: jax.Array, y: jax.Array) -> Any:
    del y
    return lambda key: jax.tree.map(lambda p: p + x.sum(), params)


def test_a_loss_of_the_shards_own_data_is_refused() -> None:
    message = refusal(of_own_loss, TypeError)
    assert "varies over the mesh axes ('d',)" in message
    assert "Pass axis_name='d'" in message


def test_an_estimate_that_varies_where_the_gradient_does_not_is_refused_by_name() -> None:
    message = refusal(of_own_examples, ValueError)
    assert "['b'] varies over the mesh axes ('d',), and the gradient does not" in message
    assert "jax.lax.pmean(estimate, ('d',))" in message
