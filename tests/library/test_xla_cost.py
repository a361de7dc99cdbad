"""What XLA for CPU makes of the update: no copy, no temporary, and nothing read twice.

The figures for TPUs are in test_tpu_cost.py, which needs the TPU compiler. A CPU compiler fuses
less, so that both AdamW and Sophia pass over memory more often here.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax
from tests import hlo

SIDE = 512
SIZE = SIDE * SIDE
PARAMS = {name: jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32) for name in "ab"}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one compiled step, in passes over all the params."""

    accessed: float
    temporaries: float
    entry: float
    copies: int


def loss(params: Any) -> jax.Array:
    return sum(jnp.sum(jnp.cos(x)) for x in params.values())


@functools.cache
def cost(tx: Any, **arguments: Any) -> Cost:
    """What `tx` and `apply_updates`, donated, cost."""
    compiled = hlo.donated_step(tx, PARAMS, **arguments)
    one_pass = 4 * SIZE * len(PARAMS)
    return Cost(
        accessed=compiled.cost_analysis()["bytes accessed"] / one_pass,
        temporaries=compiled.memory_analysis().temp_size_in_bytes / one_pass,
        entry=hlo.entry_passes(compiled, SIZE) / len(PARAMS),
        copies=hlo.copies(compiled, SIZE),
    )


def hessian_fn(params: Any) -> Any:
    return sophia_optax.hutchinson(loss, params)


@pytest.fixture(scope="module")
def sophia() -> Any:
    return sophia_optax.sophia_h(1e-3, weight_decay=0.1)


def test_a_step_off_a_refresh_passes_over_less_memory_than_adamw(sophia: Any) -> None:
    off = cost(sophia, refresh=False)
    adamw = cost(optax.adamw(1e-3, weight_decay=0.1))
    # Two kernels here, (g, m) -> m and (m, h, p) -> p, where AdamW has v beside m.
    assert off.accessed <= 7.05
    assert adamw.accessed >= 9.95
    assert off.temporaries <= 0.01
    assert off.copies == 0


def test_the_branch_adds_no_copy_and_no_pass_around_it(sophia: Any) -> None:
    both = cost(sophia, hessian_fn=hessian_fn)
    off = cost(sophia, refresh=False)
    assert both.copies == 0
    assert both.entry <= off.entry


def test_the_check_sees_the_copies_of_the_order_use_then_refresh() -> None:
    contrib = cost(optax.contrib.sophia(1e-3), obj_fn=lambda params: loss)
    assert contrib.copies >= 4


def test_a_refresh_holds_what_its_estimate_does_and_nothing_more(sophia: Any) -> None:
    with_branch = cost(sophia, hessian_fn=hessian_fn)
    refresh = cost(sophia, hessian_fn=hessian_fn, refresh=True)
    key = jax.eval_shape(lambda: jax.random.key(0))
    estimate = jax.jit(lambda p, key: hessian_fn(p)(key)).lower(PARAMS, key).compile()
    memory = estimate.memory_analysis()
    alone = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / (8 * SIZE)
    assert refresh.temporaries <= alone + 0.01
    assert with_branch.temporaries <= alone + 0.01


def test_normal_probes_are_drawn_once_and_take_no_more_memory_than_signs() -> None:
    """XLA would draw them again for the product with H u, if they did not depend on the params."""
    examples = jnp.ones((8, SIDE))

    def arrays_held(distribution: Any) -> float:
        def estimate(w: jax.Array, key: jax.Array) -> jax.Array:
            loss = lambda w: jnp.mean(jnp.tanh(examples @ w) ** 2)  # noqa: E731
            return sophia_optax.hutchinson(loss, w, distribution=distribution)(key)

        compiled = jax.jit(estimate).lower(PARAMS["a"], jax.random.key(0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * SIZE)

    assert arrays_held("gaussian") <= arrays_held("rademacher") + 0.01


@functools.cache
def step_of_many_leaves(leaves: int, gamma: Any) -> Any:
    params = {f"{i:03d}": jax.ShapeDtypeStruct((4,), jnp.float32) for i in range(leaves)}
    return hlo.donated_step(
        sophia_optax.sophia_g(1e-3, gamma=gamma),
        params,
        hessian_fn=lambda params: lambda key: jax.tree.map(jnp.square, params),
    )


@pytest.mark.parametrize("gamma", [0.05, sophia_optax.win_rate_target()], ids=["fixed", "target"])
def test_the_program_grows_as_the_number_of_leaves_does(gamma: Any) -> None:
    """Not as its square, as where each leaf's choice computes the sum over all leaves again."""

    def size(leaves: int) -> tuple[int, int]:
        compiled = step_of_many_leaves(leaves, gamma)
        return len(hlo.instructions(compiled.as_text())), len(compiled.as_text())

    for few, many in zip(size(33), size(64), strict=True):
        assert many <= 64 / 33 * few


@pytest.mark.parametrize("gamma", [0.05, sophia_optax.win_rate_target()], ids=["fixed", "target"])
def test_leaves_of_one_shape_share_their_kernels(gamma: Any) -> None:
    """A target takes γ from a vector, and a kernel that knows the place is not that of another."""
    few, many = (hlo.distinct_computations(step_of_many_leaves(n, gamma)) for n in (64, 128))
    assert many <= few + 8
    assert few < 100


def test_a_limit_of_the_estimate_adds_no_temporary_no_copy_and_no_pass_around_the_branch(
    sophia: Any,
) -> None:
    limited = sophia_optax.sophia_h(1e-3, weight_decay=0.1, max_estimate_ratio=100.0)
    with_limit = cost(limited, hessian_fn=hessian_fn)
    without = cost(sophia, hessian_fn=hessian_fn)
    assert with_limit.copies == 0
    assert with_limit.entry <= without.entry
    assert with_limit.temporaries <= without.temporaries + 0.01


def test_a_refresh_can_be_differentiated_and_vectorized() -> None:
    def first_update(b1: jax.Array, x: jax.Array) -> jax.Array:
        tx = sophia_optax.scale_by_sophia(b1=b1, gamma=1.0)
        updates, _ = tx.update(x, tx.init(x), hessian_fn=lambda key: jnp.ones(2), refresh=True)
        return updates

    def results(b1: jax.Array, x: jax.Array) -> Any:
        loss = lambda b1: jnp.sum(first_update(b1, x))  # noqa: E731
        many = jax.vmap(first_update, in_axes=(None, 0))(b1, jnp.stack([x, 2 * x]))
        return (
            jax.grad(loss)(b1),
            jax.jvp(loss, [b1], [jnp.ones_like(b1)])[1],
            many[1],
            first_update(b1, 2 * x),
        )

    x = np.array([0.5, -2.0], np.float32)
    grad, tangent, of_many, alone = jax.jit(results)(np.float32(0.9), x)
    np.testing.assert_allclose(grad, -np.sum(x), rtol=1e-5)
    np.testing.assert_allclose(tangent, -np.sum(x), rtol=1e-5)
    np.testing.assert_allclose(of_many, alone, rtol=1e-6)
