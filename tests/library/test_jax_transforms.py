"""Any pytree, and every way in which JAX transforms, stores or checks a program."""

import dataclasses
import functools
import resource
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import hypothesis
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from hypothesis import strategies as st
from jax.experimental import serialize_executable

import sophia_optax
from tests import strategies
from tests.transforms import GRADS, HESSIAN, PARAMS, numbered

Tree = Any


# Trees


class Pair(NamedTuple):
    first: Any
    second: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "b"], meta_fields=["name"])
@dataclasses.dataclass
class Layer:
    w: Any
    b: Any
    name: str = "layer"


def trees() -> st.SearchStrategy[Tree]:
    """Structs in each container that a user's params may be of, and nodes without a leaf."""
    structs = st.builds(
        jax.ShapeDtypeStruct,
        st.sampled_from(strategies.SHAPES),
        st.sampled_from((*strategies.DTYPES, "float16")),
    )
    without_a_leaf = st.sampled_from((None, optax.MaskedNode(), {}, [], ()))
    return st.recursive(
        st.one_of(structs, structs, without_a_leaf),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
            st.builds(Pair, inner, inner),
            st.builds(Layer, inner, inner),
            st.dictionaries(st.sampled_from("abc"), inner, max_size=2).map(FrozenDict),
            st.tuples(inner, inner).map(lambda two: nnx.State({"x": two[0], "y": {"z": two[1]}})),
        ),
        max_leaves=5,
    )


def two_updates(grads: Tree, estimate: Tree, **keywords: Any) -> tuple[Tree, Any]:
    """Of a transform whose branch is fixed, so that nothing is compiled for a random tree."""
    tx = sophia_optax.scale_by_sophia(gamma=1.0, **keywords)
    state = tx.init(grads)
    for refresh in (True, False):
        updates, state = tx.update(grads, state, hessian_fn=lambda key: estimate, refresh=refresh)
    return updates, state


def check_leaf_by_leaf(structs: Tree, seed: int) -> None:
    rng = np.random.default_rng(seed)
    grads = strategies.fill(structs, rng)
    estimate = strategies.fill(structs, rng, 30.0, "float32")
    updates, state = two_updates(grads, estimate)
    for tree in (updates, state.mu, state.nu):
        assert jax.tree.structure(tree) == jax.tree.structure(structs)
    alone = [
        two_updates(g, e)[0]
        for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(estimate), strict=True)
    ]
    chex.assert_trees_all_equal(jax.tree.leaves(updates), alone)


@hypothesis.settings(max_examples=20)
@hypothesis.given(trees(), st.integers(0, 2**32 - 1))
def test_the_update_of_a_tree_is_that_of_each_leaf_alone(structs: Tree, seed: int) -> None:
    check_leaf_by_leaf(structs, seed)


def test_the_update_of_a_hundred_leaves_is_that_of_each_alone() -> None:
    check_leaf_by_leaf({str(i): jax.ShapeDtypeStruct((3,), "float32") for i in range(100)}, 0)


@pytest.mark.stress
def test_the_update_of_3000_leaves_is_that_of_one_array() -> None:
    rng = np.random.default_rng(0)
    grads, estimate = (jnp.asarray(rng.normal(size=(3000, 3)), jnp.float32) for _ in range(2))
    updates, _ = two_updates(list(grads), list(estimate))
    np.testing.assert_array_equal(np.stack(updates), two_updates(grads, estimate)[0])


# Transformations of a program


WEIGHTS = {"w": jnp.array([[1.0, -0.5], [2.0, 0.3]]), "b": jnp.array([0.7, -1.0, 0.2])}


def loss_fn(params: Tree) -> jax.Array:
    return sum(
        jnp.sum(jnp.cosh(w * p))
        for w, p in zip(*map(jax.tree.leaves, (WEIGHTS, params)), strict=True)
    )


def make_step(tx: Any) -> Callable[[Tree, Any], tuple[Tree, Any]]:
    def step(params: Tree, state: Any) -> tuple[Tree, Any]:
        hessian_fn = sophia_optax.hutchinson(loss_fn, params)
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params, hessian_fn=hessian_fn)
        return optax.apply_updates(params, updates), state

    return step


def after(steps: int, tx: Any, params: Tree = PARAMS) -> Tree:
    step = make_step(tx)
    carry, _ = jax.lax.scan(
        lambda carry, _: (step(*carry), None), (params, tx.init(params)), length=steps
    )
    return carry[0]


OPTIMIZERS = {
    "sophia_h": lambda: sophia_optax.sophia_h(0.01, update_interval=2),
    "target": lambda: sophia_optax.sophia_g(
        0.01, gamma=sophia_optax.win_rate_target(0.5), update_interval=2
    ),
    "weighted target": lambda: sophia_optax.sophia_g(
        0.01, gamma=sophia_optax.win_rate_target(0.5, weighted=True), update_interval=2
    ),
    "eigenbasis": lambda: sophia_optax.sophia_h(0.01, update_interval=2, eigenbasis=True),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


START = {"learning_rate": 0.1, "gamma": 2.0, "b1": 0.5}


def final_loss(hyperparameters: dict[str, Any]) -> jax.Array:
    """The loss after three steps in float64."""
    tx = sophia_optax.sophia_h(**hyperparameters, clip_threshold=100.0)
    return loss_fn(after(3, tx, jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS)))


jitted_final_loss = jax.jit(final_loss)


@functools.cache
def derivatives(remat: bool) -> dict[str, jax.Array]:
    """Of the final loss in each hyperparameter."""
    return jax.jit(jax.grad(jax.checkpoint(final_loss) if remat else final_loss))(START)


NUMBERS = {
    "b1": (0.9, lambda x: sophia_optax.sophia_h(1e-2, b1=x)),
    "b2": (0.99, lambda x: sophia_optax.sophia_h(1e-2, b2=x)),
    "eps": (1e-12, lambda x: sophia_optax.sophia_h(1e-2, eps=x)),
    "gamma": (0.02, lambda x: sophia_optax.sophia_h(1e-2, gamma=x)),
    "clip_threshold": (1.0, lambda x: sophia_optax.sophia_h(1e-2, clip_threshold=x)),
    "update_interval": (2.0, lambda x: sophia_optax.sophia_h(1e-2, update_interval=x)),
    "weight_decay": (0.1, lambda x: sophia_optax.sophia_h(1e-2, weight_decay=x)),
    "max_estimate_ratio": (100.0, lambda x: sophia_optax.sophia_h(1e-2, max_estimate_ratio=x)),
    "learning_rate": (1e-2, lambda x: sophia_optax.sophia_g(jnp.asarray(x))),
    "basis_interval": (2.0, lambda x: sophia_optax.sophia_g(1, eigenbasis={"basis_interval": x})),
    "decay": (0.9, lambda x: sophia_optax.sophia_g(1, eigenbasis={"decay": x})),
    "target": (0.5, lambda x: sophia_optax.sophia_g(1, gamma=sophia_optax.win_rate_target(x))),
    "target for all": (
        0.5,
        lambda x: sophia_optax.sophia_g(
            1, gamma=sophia_optax.win_rate_target(x, per_tensor=False, decay=x)
        ),
    ),
}


@pytest.mark.parametrize("make_number", [np.float64, np.float32, jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_of_any_dtype_keeps_the_dtypes_of_the_state(name: str, make_number: Any) -> None:
    value, make = NUMBERS[name]
    with jax.enable_x64(True):
        tx = make(make_number(value))
        state = jax.eval_shape(tx.init, PARAMS)
        update = functools.partial(tx.update, hessian_fn=lambda key, coordinates=None: HESSIAN)
        updates, after = jax.eval_shape(update, GRADS, state, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, GRADS)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("argument", START)
def test_the_derivative_of_three_steps_is_that_of_finite_differences(
    argument: str, remat: bool
) -> None:
    with jax.enable_x64(True):
        step = 1e-6
        above, below = (
            jitted_final_loss({**START, argument: START[argument] + sign * step})
            for sign in (1, -1)
        )
        expected = (above - below) / (2 * step)
        assert abs(expected) > 1e-3
        np.testing.assert_allclose(derivatives(remat)[argument], expected, rtol=1e-6)


def test_vmap_over_seeds_is_a_transform_with_each_seed() -> None:
    def nu(seed: Any) -> Tree:
        tx = sophia_optax.scale_by_sophia(seed=seed)
        hessian_fn = numbered(HESSIAN)
        return tx.update(GRADS, tx.init(PARAMS), hessian_fn=hessian_fn, refresh=True)[1].nu

    several, *alone = jax.jit(lambda seeds: (jax.vmap(nu)(seeds), *map(nu, range(3))))(np.arange(3))
    chex.assert_trees_all_close(several, jax.tree.map(lambda *xs: np.stack(xs), *alone), rtol=1e-6)
    assert len(np.unique(several["b"][:, 1])) == 3


# Programs that are stored


def flat_step(name: str) -> tuple[Callable[..., Any], list[Any]]:
    """A step from arrays to arrays, as the formats do not know the classes of a state."""
    tx = OPTIMIZERS[name]()
    leaves, treedef = jax.tree.flatten((PARAMS, tx.init(PARAMS)))
    step = make_step(tx)
    return lambda *leaves: jax.tree.leaves(step(*treedef.unflatten(leaves))), leaves


@functools.cache
def jitted_flat_step(name: str) -> tuple[Any, list[Any]]:
    """The same, compiled once for the tests that only run it."""
    step, leaves = flat_step(name)
    return jax.jit(step), leaves


@each_optimizer
def test_a_step_is_exported_for_gpu_and_tpu_and_runs_here(name: str) -> None:
    step, leaves = jitted_flat_step(name)
    exported = jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(*leaves)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    chex.assert_trees_all_close(exported.call(*leaves), step(*leaves), rtol=1e-6, atol=1e-7)


# Settings of JAX


SETTINGS: dict[str, Callable[[], Any]] = {
    "rbg": lambda: jax.default_prng_impl("rbg"),
    "unsafe_rbg": lambda: jax.default_prng_impl("unsafe_rbg"),
    "x64": lambda: jax.enable_x64(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "debug_nans": lambda: jax.debug_nans(True),
    "leak checks": jax.checking_leaks,
}


@functools.cache
def three_steps(name: str) -> Tree:
    """The params after them, under the settings that hold by default."""
    return jax.jit(lambda: after(3, OPTIMIZERS[name]()))()


@each_optimizer
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_takes_the_same_numbers_under_every_setting(name: str, setting: str) -> None:
    """The Hessian is diagonal, so that the estimate is exact whatever the probes.

    In the eigenbasis it is not, and both x64 and another generator draw others.
    """
    expected = three_steps(name)
    with SETTINGS[setting]():
        found = jax.jit(lambda: after(3, OPTIMIZERS[name]()))()
    chex.assert_trees_all_equal_dtypes(found, expected)
    if name != "eigenbasis" or setting not in ("x64", "rbg", "unsafe_rbg"):
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    chex.assert_tree_all_finite(found)


@each_optimizer
def test_a_compiled_step_moves_nothing_between_host_and_device(name: str) -> None:
    step, leaves = jitted_flat_step(name)
    leaves = step(*leaves)
    with jax.transfer_guard("disallow"):
        leaves = step(*leaves)
    chex.assert_tree_all_finite(leaves[: len(PARAMS)])


@pytest.mark.stress
@each_optimizer
def test_100_000_steps_compile_once_and_need_no_more_memory(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tx = OPTIMIZERS[name]()
    step = jax.jit(make_step(tx), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    peaks = []
    for number in range(100_000):
        params, state = step(params, state)
        if number % 10_000 == 9_999:
            jax.block_until_ready(params)
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert step._cache_size() == 1
    with capsys.disabled():
        sys.stdout.write(f"\n{name}: {peaks[-1] - peaks[0]} KiB more at the end than at a tenth\n")
    assert peaks[-1] - peaks[0] < 16 * 1024, peaks  # kilobytes
    found = sophia_optax.diagnostics(state)
    assert (int(found.count), int(found.refreshes), int(found.rejected)) == (100_000, 50_000, 0)
    chex.assert_tree_all_finite((params, state))


# Without the compilation cache


@pytest.mark.usefixtures("no_cache")
def test_a_step_that_was_compiled_and_stored_runs_when_it_is_loaded() -> None:
    """Without the cache: for CPUs, a program that comes from it cannot be stored again.

    The fixture lasts for the rest of the module, so that this is the last test.
    """
    step, leaves = flat_step("target")
    compiled = jax.jit(step).lower(*leaves).compile()
    loaded = serialize_executable.deserialize_and_load(
        *serialize_executable.serialize(compiled), execution_devices=jax.devices()[:1]
    )
    chex.assert_trees_all_equal(loaded(*leaves), compiled(*leaves))
