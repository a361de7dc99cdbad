"""A γ that follows from a target for the win rate."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sophia_optax
from sophia_optax import win_rate_target
from sophia_optax._arrays import numbers
from sophia_optax._win_rate_target import (
    SMALL,
    TRIAL_FACTORS,
    closest_to_half,
    quantile_factors,
    unclipped_counts,
)

RNG = np.random.default_rng(0)
SIZES = {"a": 2 * SMALL, "b": SMALL}  # one leaf for each way of counting


def lognormal(size: int, spread: float = 2.0) -> np.ndarray:
    """Quantiles of a lognormal distribution in random order: smooth, however few they are."""
    quantiles = np.exp(spread * scipy.special.ndtri((np.arange(size) + 0.5) / size))
    return RNG.permutation(quantiles).astype(np.float32)


CURVATURE = {name: jnp.asarray(lognormal(size)) for name, size in SIZES.items()}
GRADS = {  # of both signs in one leaf
    "a": RNG.choice([-1, 1], SIZES["a"]) * lognormal(SIZES["a"], 3.0) * CURVATURE["a"],
    "b": lognormal(SIZES["b"], 3.0) * CURVATURE["b"],
}
NUMBERS = {
    "target": 0.3,
    "decay": 0.0,
    "b1": 0.9,
    "b2": 0.99,
    "clip_threshold": 1.0,
    "update_interval": 2,
}


def transform(
    *,
    per_tensor: bool = False,
    weighted: bool = False,
    absolute_curvature: bool = True,
    **numbers: Any,
) -> optax.GradientTransformationExtraArgs:
    numbers = NUMBERS | numbers
    gamma = win_rate_target(
        numbers.pop("target"),
        per_tensor=per_tensor,
        decay=numbers.pop("decay"),
        weighted=weighted,
    )
    return sophia_optax.scale_by_sophia(
        gamma=gamma, absolute_curvature=absolute_curvature, **numbers
    )


def step_of(tx: Any, state: Any, grads: Any = GRADS, curvature: Any = CURVATURE) -> tuple[Any, Any]:
    """A step of any transform, with a program of its own."""
    return jax.jit(lambda g, s, h: tx.update(g, s, hessian_fn=lambda key: h))(
        grads, state, curvature
    )


@functools.partial(jax.jit, static_argnames=("per_tensor", "weighted", "absolute_curvature"))
def step_with(
    numbers: Any, grads: Any, state: Any, curvature: Any, **flags: bool
) -> tuple[Any, Any]:
    """A step of `transform` with numbers that are arguments of its program."""
    tx = transform(**numbers, **flags)
    return tx.update(grads, state, hessian_fn=lambda key: curvature)


def step(
    state: Any, grads: Any = GRADS, curvature: Any = CURVATURE, **keywords: Any
) -> tuple[Any, Any]:
    """A step of `transform(**keywords)`."""
    numbers = {name: keywords.pop(name, value) for name, value in NUMBERS.items()}
    return step_with(numbers, grads, state, curvature, **keywords)


def first_step(grads: Any = GRADS, curvature: Any = CURVATURE, **keywords: Any) -> tuple[Any, Any]:
    """The first step of `transform(**keywords)`."""
    return step(transform(**keywords).init(grads), grads, curvature, **keywords)


def first_gamma(grads: Any = GRADS, curvature: Any = CURVATURE, **keywords: Any) -> float:
    return float(sophia_optax.diagnostics(first_step(grads, curvature, **keywords)[1]).gamma)


def numpy_quantile(target: float, b1: float = 0.9) -> float:
    m = np.concatenate([(1 - b1) * np.abs(np.asarray(g)) for g in GRADS.values()])
    h = np.concatenate([np.asarray(h) for h in CURVATURE.values()])
    return float(np.quantile(m / h, target))


@pytest.mark.parametrize("target", [0.05, 0.3, 0.9])
def test_gamma_is_the_quantile_of_momentum_over_curvature(target: float) -> None:
    np.testing.assert_allclose(first_gamma(target=target), numpy_quantile(target), rtol=0.1)
    own = {"target": target, "b1": 0.0, "update_interval": 1}
    state = transform(**own).init(GRADS)
    for _ in range(3):  # each from where the last one was
        _, state = step(state, **own)
    np.testing.assert_allclose(float(state.gamma), numpy_quantile(target, b1=0.0), rtol=0.02)


@pytest.mark.parametrize("target", [0.05, 0.3, 0.9])
def test_per_tensor_gamma_is_the_quantile_of_each(target: float) -> None:
    own = {"target": target, "per_tensor": True, "b1": 0.0, "update_interval": 1}
    curvature = {"a": 100 * CURVATURE["a"], "b": CURVATURE["b"]}
    state = transform(**own).init(GRADS)
    for _ in range(3):
        updates, state = step(state, GRADS, curvature, **own)
    expected = {name: np.quantile(np.abs(GRADS[name]) / curvature[name], target) for name in GRADS}
    for index, name in enumerate(GRADS):
        np.testing.assert_allclose(float(state.gamma[index]), expected[name], rtol=0.05)
        assert abs(np.mean(np.abs(updates[name]) < 1) - target) < 0.005
    found = sophia_optax.diagnostics(state)
    assert abs(float(found.win_rate) - target) < 0.005
    weights = [SIZES[name] for name in expected]
    mean = np.exp(np.average(np.log(list(expected.values())), weights=weights))
    np.testing.assert_allclose(float(found.gamma), mean, rtol=0.05)


def share_of_the_squared_norm(grads: Any, unclipped: Any) -> float:
    return float(np.sum(np.square(grads, dtype=np.float64) * unclipped) / np.sum(np.square(grads)))


@pytest.mark.parametrize("target", [0.3, 0.7])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_weighted_by_the_momentum_the_target_is_a_share_of_its_squared_norm(
    per_tensor: bool, target: float
) -> None:
    own = {"target": target, "per_tensor": per_tensor, "b1": 0.0, "update_interval": 1}
    own["weighted"] = True
    # The largest coordinate has a hundredth of the squared norm.
    grads = {"a": lognormal(SIZES["a"], 0.5), "b": 3e-5 * lognormal(SIZES["b"], 0.5)}
    state = transform(**own).init(grads)
    for _ in range(4):
        updates, state = step(state, grads, CURVATURE, **own)
    unclipped = jax.tree.map(lambda u: np.abs(np.asarray(u)) < 1, updates)
    found = {name: share_of_the_squared_norm(grads[name], unclipped[name]) for name in grads}
    # Without a γ of its own, "b" has too small a part of the norm to matter.
    for name in ("a", "b") if per_tensor else ("a",):
        assert abs(found[name] - target) < 0.02
        assert abs(unclipped[name].mean() - target) > 0.05


def test_few_large_momenta_set_a_weighted_gamma() -> None:
    """As those of frequent tokens among a large vocabulary."""
    rows = np.repeat([1.0, 1e-3], [16, 4 * SMALL - 16]).astype(np.float32)
    grads = {"w": jnp.asarray(np.tile(np.linspace(1, 2, 4, dtype=np.float32), (rows.size, 1)))}
    grads = jax.tree.map(lambda g: g * rows[:, None], grads)
    curvature = {"w": jnp.asarray(np.broadcast_to(rows[:, None] ** 2, (rows.size, 4)))}
    found = {w: first_gamma(grads, curvature, target=0.5, weighted=w) for w in (False, True)}
    # m / h of a frequent row is 0.1 to 0.2, that of a rare one a thousand times as large.
    assert 0.1 <= found[True] <= 0.2
    assert 50 <= found[False] <= 200


@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_is_derived_through_gamma(weighted: bool) -> None:
    tx = transform(per_tensor=True, weighted=weighted, b1=0.0)

    def total(scale: Any) -> tuple[Any, Any]:
        grads = jax.tree.map(lambda g: scale * g, GRADS)
        updates, _ = tx.update(grads, tx.init(GRADS), hessian_fn=lambda key: CURVATURE)
        return optax.tree.sum(updates), updates

    derivative, updates = jax.jit(jax.grad(total, has_aux=True))(1.0)
    own_steps = jax.tree.map(lambda u: jnp.where(jnp.abs(u) < 1, u, 0), updates)
    np.testing.assert_allclose(derivative, optax.tree.sum(own_steps), rtol=1e-3)


def test_per_tensor_gammas_are_those_of_a_transform_for_each() -> None:
    grads = {"a": GRADS["a"], "few": jnp.array([1.0, -2.0, 3.0]), "one": jnp.float32(2.0)}
    curvature = {
        "a": CURVATURE["a"],
        "few": jnp.array([1.0, 0.0, -1.0]),
        "one": jnp.float32(0.5),
    }
    own = {"target": 0.4, "decay": 0.5, "update_interval": 1}
    together = transform(per_tensor=True, **own)
    apart = optax.partition(
        {name: transform(**own) for name in grads}, {name: name for name in grads}
    )
    state, other = together.init(grads), apart.init(grads)

    @jax.jit
    def both(scale: jax.Array, states: Any) -> list[Any]:
        scaled = jax.tree.map(lambda g: scale * g, grads)
        return [
            tx.update(scaled, state, hessian_fn=lambda key: curvature)
            for tx, state in zip((together, apart), states, strict=True)
        ]

    for scale in (1.0, 10.0):
        (updates, state), (others, other) = both(scale, (state, other))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), updates, others)


def test_per_tensor_gamma_weighs_parameters_by_their_size() -> None:
    grads = {"one": jnp.float32(1.0), "many": jnp.ones(99), "whole": jnp.ones(3, jnp.int32)}
    state = transform(per_tensor=True).init(grads)
    gamma = jnp.array([1.0, 1e4, 1e9])  # "many", "one", "whole"
    mean = sophia_optax.diagnostics(state._replace(gamma=gamma)).gamma
    np.testing.assert_allclose(float(mean), 10 ** (4 / 100), rtol=1e-5)


@pytest.mark.parametrize("clip_threshold", [1.0, 0.25])
def test_the_share_of_coordinates_left_unclipped_is_the_target(clip_threshold: float) -> None:
    updates, state = first_step(target=0.3, clip_threshold=clip_threshold)
    moved = np.concatenate([np.abs(u) for u in jax.tree.leaves(updates)])
    assert abs(np.mean(moved < clip_threshold) - 0.3) < 0.005
    assert abs(float(state.win_rate) - 0.3) < 0.005


def test_gamma_takes_out_the_scales_of_gradient_and_curvature() -> None:
    scaled = [jax.tree.map(lambda x, c=c: c * x, GRADS) for c in (1.0, 1e-3)]
    curved = [jax.tree.map(lambda x, c=c: c * x, CURVATURE) for c in (1.0, 1e-3)]
    gamma = first_gamma()
    np.testing.assert_allclose(first_gamma(scaled[1], curved[0]), 1e-3 * gamma, rtol=0.02)
    np.testing.assert_allclose(first_gamma(scaled[0], curved[1]), 1e3 * gamma, rtol=0.02)
    np.testing.assert_allclose(first_gamma(scaled[1], curved[1]), gamma, rtol=0.02)


def test_coordinates_without_positive_curvature_do_not_count() -> None:
    ones = np.ones(SIZES["b"], np.float32)
    grads = {**GRADS, "flat": ones, "concave": ones}
    curvature = {**CURVATURE, "flat": 0 * ones, "concave": -ones}
    keywords = {"absolute_curvature": False}
    assert first_gamma(grads, curvature, **keywords) == first_gamma(**keywords)


def test_negative_curvature_counts_by_its_size_unless_the_papers_is_asked_for() -> None:
    negative = jax.tree.map(jnp.negative, CURVATURE)
    assert first_gamma(GRADS, negative) == first_gamma(GRADS, CURVATURE)
    assert first_gamma(GRADS, negative, absolute_curvature=False) == 1.0


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("params", [{}, {"w": jnp.ones(3)}], ids=["empty", "flat"])
def test_without_any_positive_curvature_gamma_stays(params: Any, per_tensor: bool) -> None:
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, state = first_step(params, zeros, per_tensor=per_tensor)
    assert float(sophia_optax.diagnostics(state).gamma) == 1.0


def test_gamma_is_averaged_in_the_logarithm_and_the_first_counts_in_full() -> None:
    own = {"decay": 0.75, "b1": 0.0, "b2": 0.0, "update_interval": 1}
    state = transform(**own).init(GRADS)
    found = []
    for scale in (1.0, 10.0, 100.0):
        grads = jax.tree.map(lambda g, s=scale: s * g, GRADS)
        _, state = step(state, grads, **own)
        found.append(float(state.gamma))
    logs = np.log10(found) - np.log10(found[0])
    weights = 0.75 ** np.arange(3)[::-1]
    np.testing.assert_allclose(logs[1], weights[2] / (weights[1] + weights[2]), atol=0.02)
    np.testing.assert_allclose(logs[2], np.average([0, 1, 2], weights=weights), atol=0.02)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_between_refreshes_gamma_stays(per_tensor: bool) -> None:
    own = {"per_tensor": per_tensor}
    _, state = first_step(**own)
    _, later = step(state, jax.tree.map(lambda g: 100 * g, GRADS), **own)
    np.testing.assert_array_equal(later.gamma, state.gamma)
    assert int(later.refreshes) == 1


@pytest.mark.parametrize("per_tensor", [False, True])
def test_a_rejected_estimate_leaves_gamma(per_tensor: bool) -> None:
    own = {"update_interval": 1, "per_tensor": per_tensor}
    _, state = first_step(**own)
    broken = {**CURVATURE, "a": CURVATURE["a"].at[0].set(jnp.nan)}
    _, later = step(state, jax.tree.map(lambda g: 100 * g, GRADS), broken, **own)
    np.testing.assert_array_equal(later.gamma, state.gamma)
    assert int(later.rejected) == 1


@pytest.mark.parametrize(
    "per_tensor, weighted", [(False, False), (True, False), (False, True), (True, True)]
)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_eight_devices_find_the_gamma_of_one(
    axis_type: AxisType, per_tensor: bool, weighted: bool
) -> None:
    own = {"per_tensor": per_tensor, "weighted": weighted}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        grads, curvature = jax.device_put((GRADS, CURVATURE), rows)
        found = first_gamma(grads, curvature, **own)
    np.testing.assert_allclose(found, first_gamma(**own), rtol=1e-6)


def test_a_fixed_gamma_is_shown_as_it_was_set() -> None:
    tx = sophia_optax.sophia_g(1e-3, gamma=0.125)
    assert float(sophia_optax.diagnostics(tx.init(GRADS)).gamma) == 0.125


def test_a_gamma_on_a_schedule_is_shown_as_it_was_used() -> None:
    tx = optax.inject_hyperparams(sophia_optax.scale_by_sophia)(gamma=lambda t: 0.5 / (t + 1))
    update = jax.jit(lambda s, g, h: tx.update(g, s, hessian_fn=lambda key: h))
    state = tx.init(GRADS)
    for expected in (0.5, 0.25):
        _, state = update(state, GRADS, CURVATURE)
        np.testing.assert_allclose(float(sophia_optax.diagnostics(state).gamma), expected)


def test_a_gamma_given_as_an_array_is_not_donated_with_the_state() -> None:
    gamma = jnp.float32(0.5)
    state = sophia_optax.scale_by_sophia(gamma=gamma).init(GRADS)
    jax.jit(lambda state: state, donate_argnums=0)(state)
    assert float(gamma) == 0.5


def gammas_with(scales: np.ndarray, **keywords: Any) -> tuple[np.ndarray, jax.Array]:
    """γ at each step of a gradient times `scales` and an equal curvature, and the last updates."""
    tx = transform(target=0.5, update_interval=10, decay=0.5, **keywords)
    grads, curvature = jnp.linspace(-1, 1, 8), 0.01 * jnp.linspace(1, 2, 8)

    def one(state: Any, scale: jax.Array) -> Any:
        updates, state = tx.update(scale * grads, state, hessian_fn=lambda key: curvature)
        return state, (sophia_optax.diagnostics(state).gamma, updates)

    run = jax.jit(lambda scales: jax.lax.scan(one, tx.init(grads), scales)[1])
    gammas, updates = run(jnp.float32(scales))
    return np.asarray(gammas), updates[-1]


@pytest.mark.parametrize("per_tensor", [False, True])
def test_gamma_waits_while_the_gradient_is_zero(per_tensor: bool) -> None:
    """It would follow the decaying momentum to zero, from where no factor brings it back."""
    gammas, updates = gammas_with(np.repeat([1, 0], [300, 2700]), per_tensor=per_tensor)
    assert gammas[-1] == gammas[300 - 1]
    np.testing.assert_array_equal(updates, 0)


def test_gamma_comes_back_within_fifteen_refreshes_of_a_gradient_that_all_but_vanished() -> None:
    gammas, _ = gammas_with(np.repeat([1, 1e-37, 1], [300, 2700, 150]))
    assert min(gammas) >= 2.0**-100
    np.testing.assert_allclose(gammas[-1], gammas[299], rtol=0.3)


def test_a_leaf_of_more_than_2_to_the_24_elements_is_counted_right() -> None:
    size = 2**24 + 2**20
    counts = unclipped_counts(np.full(size, 0.5, np.float32), np.ones(size, np.float32))
    assert counts[-1] == size
    assert counts[len(TRIAL_FACTORS) // 2] == size


def test_small_and_large_leaves_are_counted_alike() -> None:
    momentum, curvature = lognormal(SMALL), lognormal(SMALL)
    momentum[:9], curvature[4:12] = 0, 0
    gradient = momentum.copy()
    gradient[20:40] = 0
    small = unclipped_counts(momentum, curvature, 0.3, gradient)
    # A coordinate without momentum, curvature and gradient counts nowhere.
    padded = [np.pad(x, (0, SMALL)) for x in (momentum, curvature, gradient)]
    np.testing.assert_array_equal(small, unclipped_counts(*padded[:2], 0.3, padded[2]))
    scale = momentum.max()
    small = unclipped_counts(momentum, curvature, 0.3, gradient, scale)
    assert small[-1] == pytest.approx(np.sum((momentum / scale) ** 2 * (curvature > 0)), rel=1e-6)
    for shape in ((-1,), (8, -1)):
        large = [x.reshape(shape) for x in padded]
        large = unclipped_counts(*large[:2], 0.3, large[2], scale)
        np.testing.assert_allclose(large, small, rtol=1e-5)


def test_the_weights_of_a_large_leaf_are_not_lost_in_their_sum() -> None:
    """In float32, one by one, a sum of 2²⁵ weights of 0.81 stays at 2²⁴."""
    momentum = np.full((2**13, 2**12), 0.9, np.float32)
    momentum[0, 0] = 1
    counts = unclipped_counts(momentum, np.ones_like(momentum), 1.0, None, np.float32(1))
    np.testing.assert_allclose(counts[-1], 0.81 * 2**25, rtol=1e-4)
    assert counts[-2] >= 2**24


@pytest.mark.parametrize(
    ("shape", "axis"), [((50257, 768), 1), ((12, 768, 3072), 2), ((4096,), None), ((4096, 1), 1)]
)
def test_a_sum_is_cut_where_neither_part_is_long(shape: tuple[int, ...], axis: int | None) -> None:
    assert closest_to_half(shape) == axis


@pytest.mark.parametrize("size", [0, 1, 32, 33, 97])
def test_the_numbers_of_a_vector_are_its_elements(size: int) -> None:
    vector = np.float32(2.0) ** np.arange(-size, size, 2)
    np.testing.assert_array_equal(jax.jit(numbers)(vector), vector)


MAGNITUDES = st.one_of(st.just(0.0), st.floats(-38, 38).map(lambda exponent: 10.0**exponent))
each_kind = pytest.mark.parametrize(
    "per_tensor, absolute_curvature, weighted",
    [
        *((*flags, False) for flags in itertools.product((False, True), repeat=2)),
        (False, True, True),
        (True, True, True),
    ],
)


@functools.cache
def compiled_run(**keywords: Any) -> Any:
    """Refreshes with a gradient times each row of `scales`, which has two factors: all states."""
    tx = transform(target=0.5, decay=0.5, b1=0.0, b2=0.5, update_interval=1, **keywords)

    def run(grads: Any, curvature: Any, scales: jax.Array) -> Any:
        def one(state: Any, scale: jax.Array) -> Any:
            scaled = jax.tree.map(lambda g: scale[0] * (scale[1] * g), grads)
            updates, state = tx.update(scaled, state, hessian_fn=lambda key: curvature)
            return state, (updates, state)

        return jax.lax.scan(one, tx.init(grads), scales)[1]

    return jax.jit(run)


def two_leaves(numbers: Sequence[float]) -> dict[str, jax.Array]:
    return {"a": jnp.float32(numbers[:2]), "b": jnp.float32(numbers[2:])}


@each_kind
@hypothesis.settings(max_examples=50)
@hypothesis.given(
    st.lists(MAGNITUDES, min_size=6, max_size=6),
    st.lists(MAGNITUDES, min_size=6, max_size=6),
    st.lists(st.sampled_from((-1.0, 1.0)), min_size=6, max_size=6),
)
def test_gamma_and_updates_are_finite_whatever_gradient_and_curvature_are(
    per_tensor: bool,
    absolute_curvature: bool,
    weighted: bool,
    gradient: list[float],
    curvature: list[float],
    signs: list[float],
) -> None:
    """Hutchinson's estimates have both signs, those of Gauss-Newton-Bartlett one."""
    run = compiled_run(
        per_tensor=per_tensor, absolute_curvature=absolute_curvature, weighted=weighted
    )
    grads = two_leaves(np.multiply(signs, gradient))
    for curvatures in (two_leaves(curvature), two_leaves(np.multiply(signs, curvature))):
        updates, states = run(grads, curvatures, jnp.float32([(1, 1), (-1, 1), (1, 1)]))
        for leaf in jax.tree.leaves((updates, states)):
            assert np.isfinite(leaf).all()
        assert all(np.max(np.abs(u)) <= 1 for u in jax.tree.leaves(updates))
        assert np.all(np.asarray(states.gamma) >= 2.0**-100)
        assert np.all(np.asarray(states.gamma) <= 2.0**100)
        assert np.all((np.asarray(states.win_rate) >= 0) & (np.asarray(states.win_rate) <= 1))
        assert int(states.rejected[-1]) == 0


@each_kind
@hypothesis.example(gradient=30.0, ratio=0.0, quiet=-60.0)
@hypothesis.given(gradient=st.floats(-37, 36), ratio=st.floats(-28, 28), quiet=st.floats(-74, 0))
def test_gamma_is_the_quantile_thirty_refreshes_after_any_quiet_gradient_returns(
    per_tensor: bool,
    absolute_curvature: bool,
    weighted: bool,
    gradient: float,
    ratio: float,
    quiet: float,
) -> None:
    """A refresh moves γ by up to a factor of 1024, so that twenty lead through its whole range."""
    hypothesis.assume(-37 < gradient - ratio < 36)
    run = compiled_run(
        per_tensor=per_tensor, absolute_curvature=absolute_curvature, weighted=weighted
    )
    spread = np.linspace(1, 2, 40)
    grads = {"a": jnp.float32(10.0**gradient * spread), "b": jnp.float32(10.0**gradient * spread)}
    curvature = jax.tree.map(lambda g: jnp.full_like(g, 10.0 ** (gradient - ratio)), grads)
    # Two factors, as 1e-60 is no float32.
    scales = np.repeat([1, 10.0 ** (quiet / 2), 1], 30)
    _, states = run(grads, curvature, jnp.float32(np.stack([scales, scales], axis=1)))
    for gamma in np.ravel(states.gamma[-1]):
        weights = spread**2 if weighted else np.ones(40)
        assert abs(np.average(10.0**ratio * spread < gamma, weights=weights) - 0.5) <= 0.06


WRAPPERS = {
    "masked": lambda tx: optax.masked(tx, {"a": True, "b": False}),
    "partition": lambda tx: optax.partition(
        {"sophia": tx, "sgd": optax.sgd(0.1)}, {"a": "sophia", "b": "sgd"}
    ),
}


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_share_is_of_what_the_transform_owns(name: str, per_tensor: bool) -> None:
    tx = WRAPPERS[name](transform(per_tensor=per_tensor))
    _, state = step_of(tx, tx.init(GRADS))
    found = sophia_optax.diagnostics(state)
    assert abs(float(found.win_rate) - 0.3) < 0.005
    alone = first_gamma({"a": GRADS["a"]}, {"a": CURVATURE["a"]})
    np.testing.assert_allclose(float(found.gamma), alone, rtol=1e-6)


def test_gradients_that_are_missing_or_whole_numbers_keep_their_gamma() -> None:
    params = {**GRADS, "c": jnp.ones(3), "i": jnp.arange(3)}
    grads = {**GRADS, "a": None, "i": jnp.zeros(3, jnp.int32)}
    tx = transform(per_tensor=True)
    curvature = {**CURVATURE, "c": jnp.ones(3), "i": jnp.zeros(3)}
    _, state = jax.jit(lambda g, s: tx.update(g, s, hessian_fn=lambda key: curvature))(
        {**grads, "c": jnp.ones(3)}, tx.init(params)
    )
    np.testing.assert_array_equal(state.gamma == 1, [True, False, False, True])


def test_no_gamma_is_taken_for_a_parameter() -> None:
    tx = transform(per_tensor=True)
    kinds = optax.tree.map_params(tx, lambda _: "param", tx.init(GRADS), transform_non_params=str)
    assert kinds.mu == {"a": "param", "b": "param"}
    assert "param" not in kinds.gamma


def test_it_runs_under_inject_hyperparams() -> None:
    tx = optax.inject_hyperparams(sophia_optax.sophia_h)(1e-3, gamma=win_rate_target(0.3))
    update = jax.jit(lambda s, g, h: tx.update(g, s, GRADS, hessian_fn=lambda key: h))
    _, state = update(tx.init(GRADS), GRADS, CURVATURE)
    assert abs(float(sophia_optax.diagnostics(state).win_rate) - 0.3) < 0.01


def test_counting_holds_no_array() -> None:
    def temporaries(gamma: Any) -> int:
        tx = sophia_optax.scale_by_sophia(gamma=gamma)
        grads = jnp.ones((512, 512))
        state = tx.init(grads)
        update = jax.jit(
            lambda g, s: tx.update(g, s, hessian_fn=lambda key: g * g, refresh=True),
            donate_argnums=1,
        )
        return update.lower(grads, state).compile().memory_analysis().temp_size_in_bytes

    bound = temporaries(0.01) + 512 * 512 // 16
    for per_tensor in (False, True):
        assert temporaries(win_rate_target(0.3, per_tensor=per_tensor)) <= bound
        assert temporaries(win_rate_target(0.3, per_tensor=per_tensor, weighted=True)) <= bound


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: win_rate_target(0.0), ValueError, "target is 0.0"),
        (lambda: win_rate_target(1.0), ValueError, "target is 1.0"),
        (lambda: win_rate_target(0.3, decay=1.0), ValueError, "decay is 1.0"),
        (lambda: win_rate_target("0.3"), TypeError, "target"),
        (lambda: win_rate_target(0.3, per_tensor=1), TypeError, "per_tensor"),
        (lambda: win_rate_target(0.3, weighted=1), TypeError, "weighted"),
        (lambda: transform(clip_threshold=None), ValueError, "clip_threshold is None"),
        (lambda: sophia_optax.sophia_g(1.0, gamma="high"), TypeError, "gamma"),
    ],
)
def test_bad_arguments_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("size", [3, SMALL + 1])
def test_a_coordinate_at_a_trial_counts_as_clipped(size: int) -> None:
    counts = unclipped_counts(jnp.ones(size), jnp.ones(size))
    np.testing.assert_array_equal(counts[:-2], size * (np.array(TRIAL_FACTORS) > 1))


def test_coordinates_without_momentum_do_not_count() -> None:
    """An embedding's rows that no token has touched yet would otherwise pass for unclipped."""
    momenta = jnp.geomspace(0.01, 100, 50)
    counts = [
        unclipped_counts(m, jnp.ones_like(m)).astype(jnp.float32)
        for m in (momenta, jnp.concatenate([jnp.zeros(50), momenta]))
    ]
    np.testing.assert_array_equal(*counts)


def test_between_two_trials_the_logit_is_a_line_from_a_millionth_to_its_opposite() -> None:
    """All coordinates lie between a γ and the one four times as large."""
    counts = jnp.float32(np.where(np.arange(len(TRIAL_FACTORS) + 2) < 10, 0, 100)[None])
    interpolate = jax.jit(quantile_factors)
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    for target in (0.05, 0.5, 0.8):
        part = (logit(target) - logit(1e-6)) / (2 * -logit(1e-6))
        expected = TRIAL_FACTORS[9] * 4.0**part
        np.testing.assert_allclose(interpolate(counts, target), expected, rtol=1e-2)


def test_a_tensor_without_curvature_makes_no_nan_on_the_way() -> None:
    with jax.debug_nans(True):
        counts = unclipped_counts(jnp.ones(3), jnp.zeros(3)).astype(jnp.float32)
        np.testing.assert_array_equal(quantile_factors(counts[None], 0.3), 1)
