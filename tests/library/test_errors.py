"""Errors: the fact with the offending value or tree path, then a remedy."""

import math
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

import sophia_optax
from tests.transforms import (
    GRADS,
    HESSIAN,
    PARAMS,
    constant,
    jitted_update,
    numbered,
    sophia_state,
)

Tree = Any


# Errors: the fact with the offending value or tree path, then a remedy


@pytest.mark.parametrize("name", ["mu_dtype", "nu_dtype"])
def test_a_dtype_that_holds_no_average_is_refused_at_construction(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name} is 'int32'.*floating point"):
        sophia_optax.scale_by_sophia(**{name: "int32"})


BAD_NUMBERS = [
    ("b1", -0.1),
    ("b1", 1.0),
    ("b1", math.nan),
    ("b1", np.float32(1.5)),
    ("b2", 1),
    ("b2", -1e-3),
    ("b2", math.inf),
    ("eps", 0.0),
    ("eps", -1e-8),
    ("eps", math.inf),
    ("gamma", 0.0),
    ("gamma", -0.01),
    ("gamma", math.nan),
    ("clip_threshold", 0.0),
    ("clip_threshold", -1.0),
    ("clip_threshold", math.nan),
    ("max_estimate_ratio", 0.5),
    ("max_estimate_ratio", math.nan),
    ("update_interval", 0),
    ("update_interval", -3),
    ("update_interval", 2.5),
    ("update_interval", math.nan),
]


@pytest.fixture
def own_checks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the run-time type checks of the tests, which would speak before the library does."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def assert_helpful(message: str, *facts: str) -> None:
    """Every fact is in the message, which has more than one sentence (the second: a remedy)."""
    for fact in facts:
        assert fact in message, f"{fact!r} is not in {message!r}"
    sentences = re.split(r"[.;:]\s+", message.strip())
    assert len(sentences) > 1, message


@pytest.mark.parametrize("factory", ("scale_by_sophia", "sophia_h", "sophia_g"))
@pytest.mark.parametrize(("name", "value"), BAD_NUMBERS)
def test_a_number_out_of_range_is_refused_at_construction(
    factory: str, name: str, value: Any
) -> None:
    args = () if factory == "scale_by_sophia" else (1e-2,)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        getattr(sophia_optax, factory)(*args, **{name: value})
    assert_helpful(str(error.value), name, str(value))


@pytest.mark.parametrize("alias", ("sophia_h", "sophia_g"))
@pytest.mark.parametrize("value", (-0.1, math.nan))
def test_a_negative_weight_decay_is_refused(alias: str, value: float) -> None:
    with pytest.raises(ValueError, match="weight_decay") as error:
        getattr(sophia_optax, alias)(1e-2, weight_decay=value)
    assert_helpful(str(error.value), str(value))


@pytest.mark.usefixtures("own_checks_alone")
@pytest.mark.parametrize(
    "name", ("b1", "b2", "eps", "gamma", "clip_threshold", "update_interval", "weight_decay")
)
def test_a_schedule_goes_through_inject_hyperparams(name: str) -> None:
    with pytest.raises(TypeError) as error:
        sophia_optax.sophia_h(1e-2, **{name: optax.constant_schedule(0.5)})
    assert_helpful(str(error.value), name, "optax.inject_hyperparams")


SOPHIA = sophia_optax.scale_by_sophia
SCHEDULED = {
    "b1": (lambda s: sophia_optax.sophia_h(1e-2, b1=s), "1e-2"),
    "basis_interval": (lambda s: sophia_optax.in_eigenbasis(SOPHIA(), basis_interval=s), "_"),
    "decay": (lambda s: sophia_optax.in_eigenbasis(SOPHIA(), decay=s), "_"),
    "target": (sophia_optax.win_rate_target, "1e-2"),
    "decay of gamma": (lambda s: sophia_optax.win_rate_target(decay=s), "1e-2"),
}


@pytest.mark.usefixtures("own_checks_alone")
@pytest.mark.parametrize("name", SCHEDULED)
def test_the_code_in_the_error_of_a_schedule_runs(name: str) -> None:
    make, learning_rate = SCHEDULED[name]
    schedule = lambda count: 0.5 + 0.25 * (count > 0)  # noqa: E731
    with pytest.raises(TypeError, match="is a callable") as error:
        make(schedule)
    code = str(error.value).partition("Wrap the optimizer: ")[2].removesuffix(".")
    names = {**vars(sophia_optax), "optax": optax, "inner": SOPHIA(), "schedule": schedule}
    tx = eval(code.replace("...", learning_rate), names)
    hessian_fn = lambda key, coordinates=None: HESSIAN  # noqa: E731
    state = tx.init(PARAMS)
    for value in (0.5, 0.75):
        _, state = jitted_update(tx, hessian_fn)(GRADS, state, PARAMS)
        assert float(state.hyperparams[name.split(maxsplit=1)[0]]) == value


@pytest.mark.usefixtures("own_checks_alone")
def test_a_traced_interval_is_rounded_and_sizes_are_asked_to_be_static() -> None:
    inject = optax.inject_hyperparams
    with pytest.raises(TypeError, match="max_size is an array of jax") as error:
        inject(sophia_optax.in_eigenbasis)(SOPHIA()).init(PARAMS)
    assert_helpful(str(error.value), 'static_args=("max_size",)')
    tx = inject(sophia_optax.in_eigenbasis, static_args=("max_size", "block_size"))(
        optax.trace(0.9), basis_interval=lambda count: jnp.float32(2.9), block_size=2
    )
    state, bases = tx.init(PARAMS), []
    for number in range(4):
        grads = {**GRADS, "w": GRADS["w"] + number * jnp.eye(2)}
        _, state = jax.jit(tx.update)(grads, state, PARAMS)
        bases.append(np.asarray(state.inner_state.bases[0].left_basis))
    np.testing.assert_array_equal(bases[0], bases[2])  # every third step, not every second
    assert np.any(bases[2] != bases[3])


LOGITS = lambda w: jnp.ones((6, 2)) * w  # noqa: E731
COUNTS = {
    "size": lambda n: sophia_optax.curvature_batch(jnp.arange(8), n),
    "num_probes": lambda n: sophia_optax.hutchinson(jnp.sum, jnp.ones(2), num_probes=n),
    "probe_chunk": lambda n: sophia_optax.hutchinson(
        jnp.sum, jnp.ones(2), num_probes=2, probe_chunk=n
    ),
    "num_samples": lambda n: sophia_optax.gauss_newton_bartlett(LOGITS, jnp.ones(2), num_samples=n),
    "head_chunk": lambda n: sophia_optax.gauss_newton_bartlett(
        LOGITS, jnp.ones(2), head_fn=lambda w, x: x * w, head_chunk=n
    ),
    "block_size": lambda n: sophia_optax.in_eigenbasis(optax.trace(0.9), block_size=n),
    "max_size": lambda n: sophia_optax.in_eigenbasis(optax.trace(0.9), max_size=n),
}


@pytest.mark.usefixtures("own_checks_alone")
@pytest.mark.parametrize("name", COUNTS)
def test_a_count_is_a_whole_number_of_any_type(name: str) -> None:
    def result(n: Any) -> Any:
        made = COUNTS[name](n)
        if callable(made):
            return made(jax.random.key(0))
        return made if isinstance(made, jax.Array) else made.init(jnp.ones((4, 4)))

    for n in (4 / 2, np.int64(2), np.float64(2)):
        chex.assert_trees_all_equal(result(n), result(2))
    for n, error in ((2.5, ValueError), (-1, ValueError), (math.nan, ValueError)):
        with pytest.raises(error, match=f"{name} is {n}") as found:
            COUNTS[name](n)
        assert_helpful(str(found.value), "whole number")
    for n in (jnp.int32(2), True, "2", len, np.array([2, 3])):
        with pytest.raises(TypeError, match=f"{name} is") as found:
            COUNTS[name](n)
        assert_helpful(str(found.value), "number")


@pytest.mark.usefixtures("own_checks_alone")
@pytest.mark.parametrize("array", [jnp.full((4, 1), 0.5), np.full(1, 0.5)])
def test_an_array_with_axes_is_no_hyperparameter(array: Any) -> None:
    makes = {
        **{
            name: lambda value, name=name: sophia_optax.sophia_h(1e-2, **{name: value})
            for name in ("b1", "b2", "eps", "gamma", "clip_threshold", "weight_decay", "seed")
        },
        "learning_rate": sophia_optax.sophia_g,
        "target": sophia_optax.win_rate_target,
        "decay": lambda value: sophia_optax.in_eigenbasis(optax.trace(0.9), decay=value),
    }
    for name, make in makes.items():
        with pytest.raises(TypeError, match=f"{name} is an array of shape") as error:
            make(array)
        assert_helpful(str(error.value), str(array.shape))


class Half:
    """A likelihood whose residuals lack an axis."""

    event_ndim = 1

    def sample_residual(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        return outputs[..., :1]

    sample_factor = sample_residual


@pytest.mark.usefixtures("own_checks_alone")
@pytest.mark.parametrize("likelihood", ["gaussian", Half, {"a": jnp.sum}])
def test_what_is_no_likelihood_is_refused(likelihood: Any) -> None:
    with pytest.raises(TypeError, match="is no Likelihood") as error:
        sophia_optax.gauss_newton_bartlett(LOGITS, jnp.ones(2), likelihood=likelihood)
    assert_helpful(str(error.value), "sophia_optax.gaussian")


@pytest.mark.usefixtures("own_checks_alone")
@pytest.mark.parametrize("weights", [None, jnp.ones(6)])
def test_a_likelihood_that_drops_an_axis_is_refused(weights: Any) -> None:
    hessian_fn = sophia_optax.gauss_newton_bartlett(
        LOGITS, jnp.ones(2), likelihood=Half(), weights=weights
    )
    with pytest.raises(ValueError, match=r"shape \(6, 1\) for outputs of shape \(6, 2\)") as error:
        hessian_fn(jax.random.key(0))
    assert_helpful(str(error.value), "sample_residual")


@pytest.mark.usefixtures("own_checks_alone")
def test_dimension_numbers_that_are_a_plain_tuple_are_refused() -> None:
    tx = sophia_optax.in_eigenbasis(optax.trace(0.9), dimension_numbers=(0, 1))
    with pytest.raises(TypeError, match=r"of \(root\) are \(0, 1\)") as error:
        tx.init(jnp.ones((3, 2)))
    assert_helpful(str(error.value), "MatrixAxes")


def test_an_estimate_in_other_containers_is_told_by_these() -> None:
    params = {"a": [jnp.ones(2), jnp.ones(3)]}
    tx = sophia_optax.scale_by_sophia()
    with pytest.raises(ValueError, match="other containers") as error:
        tx.update(params, tx.init(params), hessian_fn=constant({"a": tuple(params["a"])}))
    assert_helpful(str(error.value), "{'a': (*, *)}", "{'a': [*, *]}")


@pytest.mark.usefixtures("own_checks_alone")
@pytest.mark.parametrize(
    ("make", "facts"),
    [
        *(
            (lambda n=n: sophia_optax.scale_by_sophia(**{n: "False"}), (n, "'False'"))
            for n in ("bias_correction", "absolute_curvature", "nesterov")
        ),
        (lambda: sophia_optax.win_rate_target(weighted="no"), ("weighted", "'no'")),
        (lambda: sophia_optax.sophia_h(1e-2, eigenbasis="both"), ("eigenbasis", "'both'")),
        (lambda: sophia_optax.win_rate_target(per_tensor=1), ("per_tensor", "1")),
    ],
)
def test_what_is_not_a_boolean_is_refused_at_construction(
    make: Any, facts: tuple[str, ...]
) -> None:
    with pytest.raises(TypeError) as error:
        make()
    assert_helpful(str(error.value), *facts)


CHANGED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "new_leaf": ({**GRADS, "lora": jnp.ones(2)}, ("no leaf at ['lora']",)),
    "lost_leaf": ({"w": GRADS["w"]}, ("a leaf at ['b']",)),
    "wrong_shape": ({**GRADS, "w": jnp.ones((2, 5))}, ("['w']", "(2, 5)", "(2, 2)")),
    "broadcast": ({**GRADS, "w": jnp.ones(2)}, ("['w']", "(2,)", "(2, 2)")),
    "deeper": ({**GRADS, "b": {"c": jnp.ones(3)}}, ("['b']",)),
    "wrong_container": ([GRADS["b"], GRADS["w"]], ("[0]",)),
}


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("refresh", (None, False))
def test_gradients_of_other_params_than_the_state_is_of_are_refused_with_their_path(
    name: str, refresh: bool | None
) -> None:
    grads, facts = CHANGED[name]
    tx = sophia_optax.scale_by_sophia()
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="gradient") as error:
        tx.update(grads, state, hessian_fn=constant(grads), refresh=refresh)
    assert_helpful(str(error.value), "init(params)", *facts)


def test_a_leaf_where_the_state_has_none_is_refused_with_its_path() -> None:
    tx = sophia_optax.scale_by_sophia()
    state = tx.init({"w": PARAMS["w"], "b": {"c": jnp.ones(3)}})
    with pytest.raises(ValueError, match=r"no leaf at \['b'\]") as error:
        tx.update(GRADS, state, refresh=False)
    assert_helpful(str(error.value), "init(params)")


@pytest.mark.parametrize(
    ("before", "per_tensor", "anew"),
    [(0.02, True, (2,)), (True, False, ()), (False, True, (2,))],
    ids=["number", "per tensor", "one for all"],
)
def test_the_state_of_another_kind_of_gamma_is_refused_with_the_way_on(
    before: Any, per_tensor: bool, anew: tuple[int, ...]
) -> None:
    def with_gamma(gamma: Any) -> Any:
        if isinstance(gamma, bool):
            gamma = sophia_optax.win_rate_target(per_tensor=gamma)
        return sophia_optax.scale_by_sophia(gamma=gamma)

    tx, state = with_gamma(per_tensor), with_gamma(before).init(PARAMS)
    for refresh in (None, False):
        with pytest.raises(ValueError, match="has a gamma of shape") as error:
            tx.update(GRADS, state, hessian_fn=constant(HESSIAN), refresh=refresh)
        assert_helpful(str(error.value), "optax.tree.set", str(per_tensor))
    state = optax.tree.set(state, gamma=jnp.ones(anew))
    tx.update(GRADS, state, hessian_fn=constant(HESSIAN))


@pytest.mark.parametrize(
    ("keywords", "params"),
    [
        ({}, {**PARAMS, "lora": jnp.ones((2, 1))}),
        ({}, {"w": jnp.ones((2, 3)), "b": PARAMS["b"]}),
        ({}, {"w": jnp.ones(4), "b": PARAMS["b"]}),
        ({"max_size": 1}, PARAMS),
        (
            {"dimension_numbers": lambda _: {"w": sophia_optax.MatrixAxes(turn="left"), "b": None}},
            PARAMS,
        ),
    ],
    ids=["new matrix", "shape", "no matrix", "max_size", "dimension_numbers"],
)
def test_bases_of_other_params_are_refused(keywords: Any, params: Any) -> None:
    state = sophia_optax.in_eigenbasis(optax.trace(0.9)).init(PARAMS)
    tx = sophia_optax.in_eigenbasis(optax.trace(0.9), **keywords)
    with pytest.raises(ValueError, match="has bases of the shapes") as error:
        tx.update(params, state, params)
    assert_helpful(str(error.value), "init(params)", "block_size")


BAD_ESTIMATES: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "wrong_shape": ({"w": jnp.ones(4), "b": HESSIAN["b"]}, ValueError, ("w", "(4,)", "(2, 2)")),
    "scalar": ({"w": HESSIAN["w"], "b": jnp.ones(())}, ValueError, ("b", "()", "(3,)")),
    "missing_leaf": ({"w": HESSIAN["w"]}, ValueError, ("b",)),
    "extra_leaf": ({**HESSIAN, "zzz": jnp.ones(2)}, ValueError, ("zzz",)),
    "wrong_container": ([HESSIAN["w"], HESSIAN["b"]], ValueError, ()),
    "none": (None, ValueError, ()),
    "complex": ({"w": HESSIAN["w"] * 1j, "b": HESSIAN["b"]}, TypeError, ("w", "complex64")),
}


@pytest.mark.parametrize("name", BAD_ESTIMATES)
@pytest.mark.parametrize("refresh", (None, True))
def test_an_estimate_that_does_not_fit_is_refused_with_its_path(
    name: str, refresh: bool | None
) -> None:
    estimate, exception, facts = BAD_ESTIMATES[name]
    tx = sophia_optax.sophia_h(1e-2)
    with pytest.raises(exception) as error:
        tx.update(GRADS, tx.init(PARAMS), PARAMS, hessian_fn=constant(estimate), refresh=refresh)
    assert_helpful(str(error.value), *facts)


def test_the_path_in_an_error_is_that_of_the_nested_leaf() -> None:
    params = {"block": [{"kernel": jnp.ones((2, 3))}, {"kernel": jnp.ones((3, 2))}]}
    estimate = {"block": [{"kernel": jnp.ones((2, 3))}, {"kernel": jnp.ones((2, 3))}]}
    tx = sophia_optax.scale_by_sophia()
    with pytest.raises(ValueError, match=re.escape("['block'][1]['kernel']")) as error:
        tx.update(params, tx.init(params), params, hessian_fn=constant(estimate))
    assert_helpful(str(error.value), "(2, 3)", "(3, 2)")


def test_a_missing_estimator_is_named_with_the_remedy() -> None:
    tx = sophia_optax.scale_by_sophia()
    with pytest.raises(ValueError, match="hessian_fn") as error:
        tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert_helpful(str(error.value), "hutchinson")


@pytest.mark.usefixtures("own_checks_alone")
@pytest.mark.parametrize("eigenbasis", (False, True))
def test_an_estimate_in_place_of_an_estimator_is_refused(eigenbasis: bool) -> None:
    tx = sophia_optax.sophia_h(1e-2, eigenbasis=eigenbasis)
    with pytest.raises(TypeError, match="hessian_fn"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, hessian_fn=HESSIAN)


@pytest.mark.usefixtures("own_checks_alone")
def test_a_traced_refresh_is_refused() -> None:
    tx = sophia_optax.scale_by_sophia()
    state = tx.init(PARAMS)

    def update(refresh: jax.Array) -> Any:
        return tx.update(GRADS, state, PARAMS, hessian_fn=constant(HESSIAN), refresh=refresh)

    with pytest.raises((TypeError, ValueError), match="refresh") as error:
        jax.jit(update)(jnp.asarray(True))
    assert type(error.value) in {TypeError, ValueError}, "JAX's own error, not the library's"


def test_complex_leaves_are_refused_with_their_path() -> None:
    params = {"real": jnp.ones(2), "z": jnp.ones(2, jnp.complex64)}
    tx = sophia_optax.scale_by_sophia()
    with pytest.raises(TypeError, match="z") as error:
        tx.update(params, tx.init(params), params, hessian_fn=constant(params))
    assert_helpful(str(error.value), "['z']", "complex64")


def test_flatten_is_named_in_the_error() -> None:
    tx = optax.flatten(sophia_optax.scale_by_sophia())
    with pytest.raises(ValueError, match=r"optax\.flatten") as error:
        tx.update(GRADS, tx.init(PARAMS), PARAMS, hessian_fn=constant(HESSIAN))
    assert_helpful(str(error.value))


@pytest.mark.parametrize("every_k", (0, -1))
def test_on_emit_refuses_an_interval_that_cannot_be(every_k: int) -> None:
    multi = optax.MultiSteps(sophia_optax.sophia_h(1e-2), 2)
    with pytest.raises(ValueError, match="every_k") as error:
        sophia_optax.on_emit(constant(HESSIAN), multi.init(PARAMS), every_k)
    assert_helpful(str(error.value), str(every_k))


@pytest.mark.usefixtures("own_checks_alone")
def test_on_emit_refuses_a_state_that_is_not_of_multi_steps() -> None:
    state = sophia_optax.sophia_h(1e-2).init(PARAMS)
    with pytest.raises((TypeError, ValueError), match="MultiSteps"):
        sophia_optax.on_emit(constant(HESSIAN), state, 2)


HALVES = (jnp.bfloat16, jnp.float16)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("factory", ("scale_by_sophia", "sophia_h", "sophia_g"))
def test_hyperparameters_in_half_precision_are_refused_with_the_remedy(
    factory: str, dtype: Any
) -> None:
    """b2 = 0.99 would be 0.988, and in float16 an eps of 1e-12 is 0, so that 0 / 0 is NaN."""
    params = jnp.ones(3, dtype)
    make = getattr(sophia_optax, factory)
    args = () if factory == "scale_by_sophia" else (1e-3,)
    with pytest.raises(TypeError, match="hyperparam_dtype") as error:
        optax.inject_hyperparams(make)(*args).init(params)
    assert_helpful(str(error.value), jnp.dtype(dtype).name)
    for name in ("b2", "eps", "gamma"):
        with pytest.raises(TypeError, match=name):
            make(*args, **{name: jnp.asarray(0.5, dtype)})


@pytest.mark.parametrize("dtype", HALVES)
def test_hyperparameters_injected_in_float32_give_the_plain_numbers(dtype: Any) -> None:
    params = {"w": jnp.asarray([1.0, -2.0, 0.5], dtype)}
    grads = {"w": jnp.asarray([0.1, 3.0, 0.0], dtype)}
    hessian_fn = constant({"w": jnp.array([1.0, 1e3, 0.0])})
    injected = optax.inject_hyperparams(sophia_optax.sophia_g, hyperparam_dtype=jnp.float32)
    found = []
    for tx in (sophia_optax.sophia_g(1e-3), injected(1e-3)):
        updates, state = jitted_update(tx, hessian_fn)(grads, tx.init(params), params)
        found.append((updates, sophia_state(state).mu, sophia_state(state).nu))
    chex.assert_trees_all_close(*found, rtol=1e-2 if dtype == jnp.bfloat16 else 2e-3)
    chex.assert_tree_all_finite(found)


@pytest.mark.parametrize("name", ("mu_dtype", "nu_dtype"))
def test_a_dtype_that_inject_hyperparams_has_called_is_refused(name: str) -> None:
    """Of jnp.float32 it makes an array in the dtype of the params, as of any schedule."""
    tx = optax.inject_hyperparams(sophia_optax.sophia_g, hyperparam_dtype=jnp.float32)
    with pytest.raises(TypeError, match=f"{name} is an array") as error:
        tx(1e-3, **{name: jnp.float32}).init(PARAMS)
    assert_helpful(str(error.value), "static_args")
    state = sophia_state(tx(1e-3, **{name: jnp.dtype("float32")}).init(PARAMS))
    chex.assert_trees_all_equal_dtypes(state.mu, state.nu, PARAMS)


@pytest.mark.usefixtures("own_checks_alone")
@pytest.mark.parametrize(
    ("seed", "error"), [(1.5, TypeError), (True, TypeError), (2**40, ValueError), ("0", TypeError)]
)
def test_a_seed_that_jax_would_refuse_or_shorten_is_refused_at_construction(
    seed: Any, error: type[Exception]
) -> None:
    """2**40 would draw what 0 does."""
    with pytest.raises(error, match="seed is"):
        sophia_optax.scale_by_sophia(seed=seed)


@pytest.mark.parametrize("seed", [-1, 2**32 - 1, np.uint32(7), np.asarray(7), jnp.int32(7)])
def test_a_seed_of_any_integer_type_is_taken(seed: Any) -> None:
    tx = sophia_optax.scale_by_sophia(seed=seed)
    _, state = tx.update(GRADS, tx.init(PARAMS), hessian_fn=numbered(HESSIAN))
    chex.assert_tree_all_finite(state)


def test_an_eps_that_hardware_takes_for_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="eps is 1e-40"):
        sophia_optax.scale_by_sophia(eps=1e-40)


@pytest.mark.parametrize("clip_threshold", (1.0, None))
def test_complex_gradients_are_refused_with_their_path(clip_threshold: float | None) -> None:
    params = {"real": jnp.ones(2), "z": jnp.ones(2, jnp.complex64)}
    tx = sophia_optax.scale_by_sophia(clip_threshold=clip_threshold)
    with pytest.raises(TypeError, match="gradient") as error:
        tx.update(params, tx.init(params), hessian_fn=constant({"real": 1.0, "z": jnp.ones(2)}))
    assert_helpful(str(error.value), "['z']", "complex64", "split_real_and_imaginary")
