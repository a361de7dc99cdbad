"""Algebraic laws, over random trees, dtypes, shapes and hyperparameters."""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st

import sophia_optax
from tests import strategies

Tree = Any
laws = hypothesis.settings(max_examples=15, deadline=None)
SINGLE_STEPS = strategies.steps(dtypes=("float32",))
POWERS_OF_TWO = st.sampled_from((2.0**-6, 0.5, 4.0, 2.0**7))


def run(
    keywords: dict[str, Any], grads: Sequence[Tree], estimates: Sequence[Tree]
) -> tuple[list[Tree], Any]:
    """The updates of each step and the last state, estimates taken whenever one is due.

    Step by step with the branch fixed, as a trainer that schedules refreshes on the host does: no
    compilation, so that random trees are cheap. That the branch under `jit` does the same is tested
    with the transform.
    """
    tx = sophia_optax.scale_by_sophia(**keywords)
    state = tx.init(grads[0])
    all_updates = []
    for t, (g, e) in enumerate(zip(grads, estimates, strict=True)):
        updates, state = tx.update(
            g, state, hessian_fn=lambda key, e=e: e, refresh=t % keywords["update_interval"] == 0
        )
        all_updates.append(updates)
    return all_updates, state


def scale(trees: Sequence[Tree], factor: float) -> list[Tree]:
    return [jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree) for tree in trees]


def concatenate(tree: Tree) -> jax.Array:
    leaves = jax.tree.leaves(tree)
    return jnp.concatenate([jnp.ravel(x) for x in leaves]) if leaves else jnp.zeros(0)


# The update


@laws
@hypothesis.given(strategies.steps(), strategies.hyperparameters())
def test_negating_the_gradients_negates_the_updates_and_nothing_else(
    steps: strategies.Steps, keywords: dict[str, Any]
) -> None:
    updates, state = run(keywords, steps.grads, steps.estimates)
    mirrored, mirrored_state = run(keywords, scale(steps.grads, -1.0), steps.estimates)
    chex.assert_trees_all_equal(mirrored, scale(updates, -1.0))
    (mirrored_mu,) = scale([mirrored_state.mu], -1.0)
    chex.assert_trees_all_equal(mirrored_state._replace(mu=mirrored_mu), state)


@laws
@hypothesis.given(strategies.steps(), strategies.hyperparameters())
def test_updates_are_bounded_by_the_clip_threshold_and_have_the_gradients_dtypes(
    steps: strategies.Steps, keywords: dict[str, Any]
) -> None:
    updates, state = run(keywords, steps.grads, steps.estimates)
    for update in updates:
        chex.assert_trees_all_equal_shapes_and_dtypes(update, steps.grads[0])
        for leaf in jax.tree.leaves(update):
            assert np.all(np.abs(np.asarray(leaf, np.float32)) <= keywords["clip_threshold"])
    chex.assert_trees_all_equal_shapes_and_dtypes(state.mu, steps.grads[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(state.nu, steps.estimates[0])
    assert 0 <= float(state.win_rate) <= 1


@laws
@hypothesis.given(strategies.steps(), strategies.hyperparameters())
def test_an_update_never_points_against_the_momentum(
    steps: strategies.Steps, keywords: dict[str, Any]
) -> None:
    """Whatever the sign of the curvature: u and m have one sign, coordinate by coordinate."""
    updates, state = run(keywords, steps.grads, steps.estimates)
    for u, m in zip(jax.tree.leaves(updates[-1]), jax.tree.leaves(state.mu), strict=True):
        assert np.all(np.asarray(u, np.float64) * np.asarray(m, np.float64) >= 0)


@laws
@hypothesis.given(
    strategies.steps(shapes=((), (3,), (2, 3))),
    strategies.hyperparameters(),
    st.sampled_from((np.nan, np.inf, -np.inf)),
    st.integers(0, 100),
)
def test_a_rejected_estimate_changes_nothing(
    steps: strategies.Steps, keywords: dict[str, Any], bad: float, where: int
) -> None:
    """The last step's estimate has one bad coordinate: the step is that without a refresh."""
    tx = sophia_optax.scale_by_sophia(**keywords)
    _, state = run(keywords, steps.grads[:-1], steps.estimates[:-1])
    leaves, treedef = jax.tree.flatten(steps.estimates[-1])
    leaf = where % len(leaves)
    flat = jnp.ravel(leaves[leaf]).at[where % leaves[leaf].size].set(bad)
    leaves[leaf] = flat.reshape(leaves[leaf].shape)
    poisoned = treedef.unflatten(leaves)
    updates, rejected = tx.update(
        steps.grads[-1], state, hessian_fn=lambda key: poisoned, refresh=True
    )
    expected_updates, expected = tx.update(steps.grads[-1], state, refresh=False)
    assert int(rejected.rejected) == int(expected.rejected) + 1
    chex.assert_trees_all_equal(updates, expected_updates)
    chex.assert_trees_all_equal(rejected._replace(rejected=expected.rejected), expected)


@laws
@hypothesis.given(SINGLE_STEPS, strategies.hyperparameters())
def test_coordinates_are_on_their_own(steps: strategies.Steps, keywords: dict[str, Any]) -> None:
    """However they are grouped into leaves: one concatenated vector takes the same steps.

    So leaves can be permuted, stacked, split and reshaped.
    """
    updates, state = run(keywords, steps.grads, steps.estimates)
    together, together_state = run(
        keywords, [*map(concatenate, steps.grads)], [*map(concatenate, steps.estimates)]
    )
    chex.assert_trees_all_close([*map(concatenate, updates)], together, rtol=1e-6)
    chex.assert_trees_all_close(concatenate(state.nu), together_state.nu, rtol=1e-6)
    np.testing.assert_allclose(state.win_rate, together_state.win_rate, rtol=1e-6)


@laws
@hypothesis.given(strategies.steps(), strategies.hyperparameters())
def test_the_order_of_the_leaves_does_not_matter(
    steps: strategies.Steps, keywords: dict[str, Any]
) -> None:
    def reverse(tree: Tree) -> list[Tree]:
        return jax.tree.leaves(tree)[::-1]

    updates, state = run(keywords, steps.grads, steps.estimates)
    reversed_updates, reversed_state = run(
        keywords, [*map(reverse, steps.grads)], [*map(reverse, steps.estimates)]
    )
    chex.assert_trees_all_equal([*map(reverse, updates)], reversed_updates)
    chex.assert_trees_all_equal(reverse(state.nu), reversed_state.nu)
    np.testing.assert_allclose(state.win_rate, reversed_state.win_rate, rtol=1e-6)


@laws
@hypothesis.given(SINGLE_STEPS, strategies.hyperparameters(), POWERS_OF_TWO)
def test_scaling_the_loss_scales_nothing(
    steps: strategies.Steps, keywords: dict[str, Any], factor: float
) -> None:
    """Gradients and curvature times c: the ratio is the same, exactly for powers of two."""
    updates, state = run(keywords, steps.grads, steps.estimates)
    scaled, scaled_state = run(
        keywords | {"eps": 1e-12 * factor},
        scale(steps.grads, factor),
        scale(steps.estimates, factor),
    )
    chex.assert_trees_all_close(scaled, updates, rtol=1e-6)
    chex.assert_trees_all_equal(scaled_state.nu, scale([state.nu], factor)[0])
    assert scaled_state.win_rate == state.win_rate


@laws
@hypothesis.given(SINGLE_STEPS, strategies.hyperparameters(), POWERS_OF_TWO)
def test_gamma_is_a_scale_of_the_curvature(
    steps: strategies.Steps, keywords: dict[str, Any], factor: float
) -> None:
    updates, state = run(keywords, steps.grads, scale(steps.estimates, factor))
    gamma = keywords["gamma"] * factor
    same, same_state = run(keywords | {"gamma": gamma}, steps.grads, steps.estimates)
    chex.assert_trees_all_close(updates, same, rtol=1e-6)
    assert state.win_rate == same_state.win_rate


@laws
@hypothesis.given(SINGLE_STEPS, strategies.hyperparameters(), POWERS_OF_TWO)
def test_gradients_and_clip_threshold_scale_together(
    steps: strategies.Steps, keywords: dict[str, Any], factor: float
) -> None:
    """u(c g; c ρ) = c u(g; ρ)."""
    updates, state = run(keywords, steps.grads, steps.estimates)
    clip_threshold = keywords["clip_threshold"] * factor
    scaled, scaled_state = run(
        keywords | {"clip_threshold": clip_threshold}, scale(steps.grads, factor), steps.estimates
    )
    chex.assert_trees_all_close(scaled, scale(updates, factor), rtol=1e-6)
    assert state.win_rate == scaled_state.win_rate


@laws
@hypothesis.given(strategies.steps(), strategies.hyperparameters(), st.integers(0, 15))
def test_masking_restricts_and_changes_nothing_else(
    steps: strategies.Steps, keywords: dict[str, Any], bits: int
) -> None:
    """Owned leaves take the steps that they take in the whole tree; the estimate stays whole."""
    treedef = jax.tree.structure(steps.structs)
    owned = treedef.unflatten(bool(bits >> i & 1) for i in range(treedef.num_leaves))
    tx = optax.masked(sophia_optax.scale_by_sophia(**keywords), owned)
    whole, _ = run(keywords, steps.grads[:1], steps.estimates[:1])
    updates, _ = tx.update(
        steps.grads[0],
        tx.init(steps.grads[0]),
        hessian_fn=lambda key: steps.estimates[0],
        refresh=True,
    )
    expected = jax.tree.map(
        lambda mine, update, grad: update if mine else grad, owned, whole[0], steps.grads[0]
    )
    chex.assert_trees_all_equal(updates, expected)


# The estimate


def quartic(weights: Tree) -> Callable[[Tree], jax.Array]:
    """A loss with a diagonal Hessian, 12 w x², and another for every tree of weights."""

    def loss(params: Tree) -> jax.Array:
        terms = jax.tree.map(lambda w, x: jnp.sum(w * x**4), weights, params)
        return sum(jax.tree.leaves(terms), jnp.zeros(()))

    return loss


def coupled(weights: Tree) -> Callable[[Tree], jax.Array]:
    """A loss with a dense Hessian: a function of a weighted sum of all coordinates."""

    def loss(params: Tree) -> jax.Array:
        terms = jax.tree.map(lambda w, x: jnp.sum(w * jnp.sin(x)), weights, params)
        return sum(jax.tree.leaves(terms), jnp.zeros(())) ** 2

    return loss


@st.composite
def params_and_weights(draw: st.DrawFn) -> tuple[Tree, Tree, Tree]:
    """A float32 tree of parameters and two of weights."""
    tree = draw(strategies.structs(dtypes=("float32",)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return tuple(jax.tree.map(lambda s: rng.normal(size=s.shape), tree) for _ in range(3))


def hutchinson(loss: Callable[[Tree], jax.Array], params: Tree, **keywords: Any) -> Tree:
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    return sophia_optax.hutchinson(loss, params, **keywords)(jax.random.key(1))


few = hypothesis.settings(max_examples=8, deadline=None)


@few
@hypothesis.given(params_and_weights())
def test_hutchinson_is_exact_for_a_diagonal_hessian_on_any_tree(
    drawn: tuple[Tree, Tree, Tree],
) -> None:
    params, weights, _ = drawn
    estimate = hutchinson(quartic(weights), params)
    expected = jax.tree.map(lambda w, x: 12 * w * x**2, weights, params)
    chex.assert_trees_all_close(estimate, expected, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal_dtypes(
        estimate, jax.tree.map(lambda _: jnp.zeros((), jnp.float32), params)
    )


@few
@hypothesis.given(params_and_weights(), st.sampled_from((-2.0, 0.0, 0.5)))
def test_hutchinson_is_linear_in_the_loss(drawn: tuple[Tree, Tree, Tree], factor: float) -> None:
    """With the same key: the estimate of a sum is the sum of the estimates."""
    params, first, second = drawn
    one, other = coupled(first), quartic(second)
    estimate = hutchinson(lambda p: one(p) + factor * other(p), params)
    parts = hutchinson(one, params), hutchinson(other, params)
    expected = jax.tree.map(lambda a, b: a + factor * b, *parts)
    chex.assert_trees_all_close(estimate, expected, rtol=1e-4, atol=1e-4)


@few
@hypothesis.given(
    st.integers(0, 2**32 - 1),
    st.sampled_from((1, 3, 8)),
    st.sampled_from(("labels", "curvature_propagation")),
    POWERS_OF_TWO,
)
def test_gauss_newton_bartlett_is_nonnegative_and_knows_only_relative_weights(
    seed: int, predictions: int, sampling: str, factor: float
) -> None:
    rng = np.random.default_rng(seed)
    inputs = jnp.asarray(rng.normal(size=(predictions, 4)), jnp.float32)
    weights = jnp.asarray(rng.uniform(0.1, 1.0, size=predictions), jnp.float32)
    params = {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), "b": jnp.zeros(3)}

    def estimate(weights: jax.Array) -> Tree:
        return sophia_optax.gauss_newton_bartlett(
            lambda p: inputs @ p["w"] + p["b"], params, weights=weights, sampling=sampling
        )(jax.random.key(seed))

    plain = estimate(weights)
    assert all(bool(jnp.all(leaf >= 0)) for leaf in jax.tree.leaves(plain))
    chex.assert_trees_all_close(estimate(factor * weights), plain, rtol=1e-5, atol=1e-7)
