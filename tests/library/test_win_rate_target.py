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
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sophia_optax
from sophia_optax import win_rate_target
from sophia_optax._arrays import numbers
from sophia_optax._win_rate_target import (
    SMALL,
    TRIAL_FACTORS,
    quantile_factors,
    unclipped_counts,
)

KEYS = jax.random.split(jax.random.key(0), 8)
SIZE = 2000


def lognormal(key: jax.Array, spread: float = 2.0) -> jax.Array:
    return jnp.exp(spread * jax.random.normal(key, (SIZE,)))


GRADS = {"a": lognormal(KEYS[0]) * jax.random.rademacher(KEYS[1], (SIZE,)), "b": lognormal(KEYS[2])}
CURVATURE = {"a": lognormal(KEYS[3]), "b": lognormal(KEYS[4])}


def transform(target: float = 0.3, **keywords: Any) -> optax.GradientTransformationExtraArgs:
    own = {"per_tensor": False, "decay": 0.0}
    own = {name: keywords.pop(name, value) for name, value in own.items()}
    gamma = win_rate_target(target, **own)
    return sophia_optax.scale_by_sophia(gamma=gamma, **{"update_interval": 2, **keywords})


def step(tx: Any, state: Any, grads: Any = GRADS, curvature: Any = CURVATURE) -> tuple[Any, Any]:
    return jax.jit(lambda g, s, h: tx.update(g, s, hessian_fn=lambda key: h))(
        grads, state, curvature
    )


def first_gamma(grads: Any = GRADS, curvature: Any = CURVATURE, **keywords: Any) -> float:
    tx = transform(**keywords)
    return float(sophia_optax.diagnostics(step(tx, tx.init(grads), grads, curvature)[1]).gamma)


def numpy_quantile(target: float, b1: float = 0.9) -> float:
    m = np.concatenate([(1 - b1) * np.abs(np.asarray(g)) for g in GRADS.values()])
    h = np.concatenate([np.asarray(h) for h in CURVATURE.values()])
    return float(np.quantile(m / h, target))


@pytest.mark.parametrize("target", [0.05, 0.3, 0.9])
def test_gamma_is_the_quantile_of_momentum_over_curvature(target: float) -> None:
    np.testing.assert_allclose(first_gamma(target=target), numpy_quantile(target), rtol=0.1)
    tx = transform(target, b1=0.0, update_interval=1)
    state = tx.init(GRADS)
    for _ in range(3):  # each from where the last one was
        _, state = step(tx, state)
    np.testing.assert_allclose(float(state.gamma), numpy_quantile(target, b1=0.0), rtol=0.02)


@pytest.mark.parametrize("target", [0.05, 0.3, 0.9])
def test_per_tensor_gamma_is_the_quantile_of_each(target: float) -> None:
    tx = transform(target, per_tensor=True, b1=0.0, update_interval=1)
    curvature = {"a": 100 * CURVATURE["a"], "b": CURVATURE["b"]}
    state = tx.init(GRADS)
    for _ in range(3):
        updates, state = step(tx, state, GRADS, curvature)
    expected = {name: np.quantile(jnp.abs(GRADS[name]) / curvature[name], target) for name in GRADS}
    for index, name in enumerate(GRADS):
        np.testing.assert_allclose(float(state.gamma[index]), expected[name], rtol=0.05)
        assert abs(np.mean(np.abs(updates[name]) < 1) - target) < 0.005
    found = sophia_optax.diagnostics(state)
    assert abs(float(found.win_rate) - target) < 0.005
    mean = np.exp(np.mean(np.log(list(expected.values()))))
    np.testing.assert_allclose(float(found.gamma), mean, rtol=0.05)


def test_per_tensor_gammas_are_those_of_a_transform_for_each() -> None:
    grads = {**GRADS, "few": jnp.array([1.0, -2.0, 3.0]), "one": jnp.float32(2.0)}
    curvature = {**CURVATURE, "few": jnp.array([1.0, 0.0, -1.0]), "one": jnp.float32(0.5)}
    together = transform(0.4, per_tensor=True, decay=0.5, update_interval=1)
    apart = optax.partition(
        {name: transform(0.4, decay=0.5, update_interval=1) for name in grads},
        {name: name for name in grads},
    )
    state, other = together.init(grads), apart.init(grads)
    for scale in (1.0, 10.0):
        scaled = jax.tree.map(lambda g, s=scale: s * g, grads)
        updates, state = step(together, state, scaled, curvature)
        others, other = step(apart, other, scaled, curvature)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), updates, others)


def test_per_tensor_gamma_weighs_parameters_by_their_size() -> None:
    grads = {"one": jnp.float32(1.0), "many": jnp.ones(99), "whole": jnp.ones(3, jnp.int32)}
    state = transform(per_tensor=True).init(grads)
    gamma = jnp.array([1.0, 1e4, 1e9])  # "many", "one", "whole"
    mean = sophia_optax.diagnostics(state._replace(gamma=gamma)).gamma
    np.testing.assert_allclose(float(mean), 10 ** (4 / 100), rtol=1e-5)


@pytest.mark.parametrize("clip_threshold", [1.0, 0.25])
def test_the_share_of_coordinates_left_unclipped_is_the_target(clip_threshold: float) -> None:
    tx = transform(0.3, clip_threshold=clip_threshold)
    updates, state = step(tx, tx.init(GRADS))
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
    grads = {**GRADS, "flat": jnp.ones(SIZE), "concave": jnp.ones(SIZE)}
    curvature = {**CURVATURE, "flat": jnp.zeros(SIZE), "concave": -jnp.ones(SIZE)}
    keywords = {"absolute_curvature": False}
    assert first_gamma(grads, curvature, **keywords) == first_gamma(**keywords)


def test_negative_curvature_counts_by_its_size_unless_the_papers_is_asked_for() -> None:
    negative = jax.tree.map(jnp.negative, CURVATURE)
    assert first_gamma(GRADS, negative) == first_gamma(GRADS, CURVATURE)
    assert first_gamma(GRADS, negative, absolute_curvature=False) == 1.0


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("params", [{}, {"w": jnp.ones(3)}], ids=["empty", "flat"])
def test_without_any_positive_curvature_gamma_stays(params: Any, per_tensor: bool) -> None:
    tx = transform(per_tensor=per_tensor)
    _, state = step(tx, tx.init(params), params, jax.tree.map(jnp.zeros_like, params))
    assert float(sophia_optax.diagnostics(state).gamma) == 1.0


def test_gamma_is_averaged_in_the_logarithm_and_the_first_counts_in_full() -> None:
    tx = transform(decay=0.75, b1=0.0, b2=0.0, update_interval=1)
    state = tx.init(GRADS)
    found = []
    for scale in (1.0, 10.0, 100.0):
        grads = jax.tree.map(lambda g, s=scale: s * g, GRADS)
        _, state = step(tx, state, grads)
        found.append(float(state.gamma))
    logs = np.log10(found) - np.log10(found[0])
    weights = 0.75 ** np.arange(3)[::-1]
    np.testing.assert_allclose(logs[1], weights[2] / (weights[1] + weights[2]), atol=0.02)
    np.testing.assert_allclose(logs[2], np.average([0, 1, 2], weights=weights), atol=0.02)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_between_refreshes_gamma_stays(per_tensor: bool) -> None:
    tx = transform(per_tensor=per_tensor)
    _, state = step(tx, tx.init(GRADS))
    _, later = step(tx, state, jax.tree.map(lambda g: 100 * g, GRADS))
    np.testing.assert_array_equal(later.gamma, state.gamma)
    assert int(later.refreshes) == 1


@pytest.mark.parametrize("per_tensor", [False, True])
def test_a_rejected_estimate_leaves_gamma(per_tensor: bool) -> None:
    tx = transform(update_interval=1, per_tensor=per_tensor)
    _, state = step(tx, tx.init(GRADS))
    broken = {**CURVATURE, "a": CURVATURE["a"].at[0].set(jnp.nan)}
    _, later = step(tx, state, jax.tree.map(lambda g: 100 * g, GRADS), broken)
    np.testing.assert_array_equal(later.gamma, state.gamma)
    assert int(later.rejected) == 1


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_eight_devices_find_the_gamma_of_one(axis_type: AxisType, per_tensor: bool) -> None:
    own = {"per_tensor": per_tensor}
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
    state = tx.init(GRADS)
    for expected in (0.5, 0.25):
        _, state = step(tx, state)
        np.testing.assert_allclose(float(sophia_optax.diagnostics(state).gamma), expected)


def test_a_gamma_given_as_an_array_is_not_donated_with_the_state() -> None:
    gamma = jnp.float32(0.5)
    state = sophia_optax.scale_by_sophia(gamma=gamma).init(GRADS)
    jax.jit(lambda state: state, donate_argnums=0)(state)
    assert float(gamma) == 0.5


def gammas_with(grads_at: Any, steps: int, **keywords: Any) -> tuple[list[float], Any]:
    """γ and the updates of a transform whose gradient changes and whose curvature does not."""
    tx = transform(0.5, update_interval=10, decay=0.5, **keywords)
    curvature = 0.01 * jnp.linspace(1, 2, 8)
    update = jax.jit(lambda g, s: tx.update(g, s, hessian_fn=lambda key: curvature))
    state, gammas = tx.init(curvature), []
    for number in range(steps):
        updates, state = update(grads_at(number), state)
        gammas.append(float(sophia_optax.diagnostics(state).gamma))
    return gammas, updates


@pytest.mark.parametrize("per_tensor", [False, True])
def test_gamma_waits_while_the_gradient_is_zero(per_tensor: bool) -> None:
    """It would follow the decaying momentum to zero, from where no factor brings it back."""
    grads = jnp.linspace(-1, 1, 8)
    gammas, updates = gammas_with(
        lambda n: grads * (not 300 <= n < 3000), 3000, per_tensor=per_tensor
    )
    assert gammas[-1] == gammas[300 - 1]
    np.testing.assert_array_equal(updates, 0)


def test_gamma_comes_back_within_fifteen_refreshes_of_a_gradient_that_all_but_vanished() -> None:
    grads = jnp.linspace(-1, 1, 8)
    gammas, _ = gammas_with(lambda n: grads * (1e-37 if 300 <= n < 3000 else 1), 3150)
    assert min(gammas) >= 2.0**-100
    np.testing.assert_allclose(gammas[-1], gammas[299], rtol=0.3)


def test_a_leaf_of_more_than_2_to_the_24_elements_is_counted_right() -> None:
    size = 2**24 + 2**20
    counts = jax.jit(unclipped_counts)(jnp.full(size, 0.5), jnp.ones(size))
    assert counts[-1] == size
    assert counts[len(TRIAL_FACTORS) // 2] == size


def test_small_and_large_leaves_are_counted_alike() -> None:
    momentum, curvature = lognormal(KEYS[5])[:SMALL], lognormal(KEYS[6])[:SMALL]
    momentum, curvature = momentum.at[:9].set(0), curvature.at[4:12].set(0)
    gradient = momentum.at[20:40].set(0)
    small = unclipped_counts(momentum, curvature, 0.3, gradient)
    # A coordinate without momentum, curvature and gradient counts nowhere.
    padded = [jnp.pad(x, (0, SMALL)) for x in (momentum, curvature, gradient)]
    np.testing.assert_array_equal(small, unclipped_counts(*padded[:2], 0.3, padded[2]))


@pytest.mark.parametrize("size", [0, 1, 32, 33, 97])
def test_the_numbers_of_a_vector_are_its_elements(size: int) -> None:
    vector = 2.0 ** jnp.arange(-size, size, 2)
    np.testing.assert_array_equal(jax.jit(numbers)(vector), vector)


MAGNITUDES = st.one_of(st.just(0.0), st.floats(-38, 38).map(lambda exponent: 10.0**exponent))
each_kind = pytest.mark.parametrize(
    "per_tensor, absolute_curvature", list(itertools.product((False, True), repeat=2))
)


@functools.cache
def compiled_run(**keywords: Any) -> Any:
    """Refreshes with a gradient times each row of `scales`, which has two factors: all states."""
    tx = transform(0.5, decay=0.5, b1=0.0, b2=0.5, update_interval=1, **keywords)

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
    gradient: list[float],
    curvature: list[float],
    signs: list[float],
) -> None:
    """Hutchinson's estimates have both signs, those of Gauss-Newton-Bartlett one."""
    run = compiled_run(per_tensor=per_tensor, absolute_curvature=absolute_curvature)
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
    per_tensor: bool, absolute_curvature: bool, gradient: float, ratio: float, quiet: float
) -> None:
    """A refresh moves γ by up to a factor of 1024, so that twenty lead through its whole range."""
    hypothesis.assume(-37 < gradient - ratio < 36)
    run = compiled_run(per_tensor=per_tensor, absolute_curvature=absolute_curvature)
    spread = np.linspace(1, 2, 40)
    grads = {"a": jnp.float32(10.0**gradient * spread), "b": jnp.float32(10.0**gradient * spread)}
    curvature = jax.tree.map(lambda g: jnp.full_like(g, 10.0 ** (gradient - ratio)), grads)
    # Two factors, as 1e-60 is no float32.
    scales = np.repeat([1, 10.0 ** (quiet / 2), 1], 30)
    _, states = run(grads, curvature, jnp.float32(np.stack([scales, scales], axis=1)))
    for gamma in np.ravel(states.gamma[-1]):
        assert abs(np.mean(10.0**ratio * spread < gamma) - 0.5) <= 0.05


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
    _, state = step(tx, tx.init(GRADS))
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
    _, state = jax.jit(lambda s: tx.update(GRADS, s, GRADS, hessian_fn=lambda key: CURVATURE))(
        tx.init(GRADS)
    )
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

    for per_tensor in (False, True):
        target = win_rate_target(0.3, per_tensor=per_tensor)
        assert temporaries(target) <= temporaries(0.01) + 512 * 512 // 16


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: win_rate_target(0.0), ValueError, "target is 0.0"),
        (lambda: win_rate_target(1.0), ValueError, "target is 1.0"),
        (lambda: win_rate_target(0.3, decay=1.0), ValueError, "decay is 1.0"),
        (lambda: win_rate_target("0.3"), TypeError, "target"),
        (lambda: win_rate_target(0.3, per_tensor=1), TypeError, "per_tensor"),
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
    counts = jnp.where(jnp.arange(len(TRIAL_FACTORS) + 2) < 10, 0.0, 100.0)[None]
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    for target in (0.05, 0.5, 0.8):
        part = (logit(target) - logit(1e-6)) / (2 * -logit(1e-6))
        expected = TRIAL_FACTORS[9] * 4.0**part
        np.testing.assert_allclose(quantile_factors(counts, target), expected, rtol=1e-2)


def test_a_tensor_without_curvature_makes_no_nan_on_the_way() -> None:
    with jax.debug_nans(True):
        counts = unclipped_counts(jnp.ones(3), jnp.zeros(3)).astype(jnp.float32)
        np.testing.assert_array_equal(quantile_factors(counts[None], 0.3), 1)
