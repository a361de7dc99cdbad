"""`diagnostics`: found in whatever a state is nested in, or an error that says why it is not."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import sophia_optax

PARAMS = {"w": jnp.array([1.0, -2.0, 3.0]), "b": jnp.array([0.5])}
HESSIAN = {"w": jnp.array([1e3, 1e-3, 1e3]), "b": jnp.array([1e-3])}

NESTINGS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1e3), tx),
    "named_chain": lambda tx: optax.named_chain(("sophia", tx), ("identity", optax.identity())),
    "masked": lambda tx: optax.masked(tx, True),
    "partition": lambda tx: optax.partition({"s": tx, "a": optax.adam(1e-3)}, "s"),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 1),
    "lookalike": lambda tx: optax.chain(optax.scale_by_schedule(lambda count: 1.0), tx),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda b1: tx)(b1=0.5),
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_found_in_any_nesting(nesting: str) -> None:
    """After a good estimate and two broken ones: half the coordinates won at the one refresh."""
    tx = NESTINGS[nesting](
        sophia_optax.sophia_h(1e-2, b1=0.0, b2=0.0, gamma=1.0, update_interval=1)
    )

    @jax.jit
    def three_updates() -> Any:
        state = tx.init(PARAMS)
        for scale in (1.0, jnp.nan, jnp.inf):
            hessian = jax.tree.map(lambda h, scale=scale: h * scale, HESSIAN)
            _, state = tx.update(PARAMS, state, PARAMS, hessian_fn=lambda key, h=hessian: h)
        return state, sophia_optax.diagnostics(state)

    state, inside_jit = three_updates()
    found = sophia_optax.diagnostics(state)
    assert isinstance(found, sophia_optax.SophiaDiagnostics)
    assert found._fields == ("count", "refreshes", "rejected", "win_rate", "gamma")
    assert [float(x) for x in found] == [3.0, 1.0, 2.0, 0.5, 1.0]
    chex.assert_trees_all_equal(inside_jit, found)


def test_the_alias_and_the_transform_alone_are_found() -> None:
    for tx in (
        sophia_optax.scale_by_sophia(),
        sophia_optax.sophia_h(1e-3),
        sophia_optax.sophia_g(optax.constant_schedule(1e-3)),
    ):
        assert sophia_optax.diagnostics(tx.init(PARAMS)).count == 0


def test_it_reads_shapes_as_well_as_arrays() -> None:
    for gamma in (0.1, sophia_optax.win_rate_target()):
        abstract = jax.eval_shape(sophia_optax.sophia_h(1e-3, gamma=gamma).init, PARAMS)
        found = sophia_optax.diagnostics(abstract)
        assert found.win_rate.dtype == found.gamma.dtype == jnp.float32


def test_a_batch_of_optimizers_has_a_batch_of_diagnostics() -> None:
    states = jax.vmap(sophia_optax.sophia_h(1e-3).init)(jnp.zeros((5, 3)))
    assert sophia_optax.diagnostics(states).refreshes.shape == (5,)


def test_a_state_without_sophia_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ScaleBySophiaState.*\. .*sophia_h"):
        sophia_optax.diagnostics(optax.adamw(1e-3).init(PARAMS))


def test_two_sophias_are_refused_and_each_alone_is_found() -> None:
    tx = optax.partition(
        {"h": sophia_optax.sophia_h(1e-3), "g": sophia_optax.sophia_g(1e-3)}, {"w": "h", "b": "g"}
    )
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"2.*'g'.*'h'"):
        sophia_optax.diagnostics(state)
    assert sophia_optax.diagnostics(state.inner_states["h"]).count == 0
