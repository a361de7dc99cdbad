"""The ablations of Sophia in the eigenbasis, and the ways to orthonormalize a basis."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import ablations, orthonormalize
from benchmarks.ablations import CHANGES, Change, turned, with_race
from examples.lm.optimizers import OPTIMIZERS, Hyperparameters, build, matrix_axes

RNG = np.random.default_rng(0)
PARAMS = {
    name: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    for name, shape in {"embedding": (6, 4), "up": (1, 4, 256), "scale": (4,)}.items()
}
H = Hyperparameters(1e-2, b1=0.8, b2=0.9, gamma=0.5, weight_decay=0.0, warmup=0.0, basis_interval=1)


def last_update(row, point=(), sample=lambda grads: grads):
    """The third update of a row, where an estimate is the square of a sample of the gradient."""
    tx, _ = build(row, replace(H, **dict(point)), 4)

    @jax.jit
    def step(grads, state):
        def estimate(key, /, *, coordinates):
            return jax.tree.map(jnp.square, coordinates.turn(sample(grads)))

        return tx.update(grads, state, PARAMS, hessian_fn=estimate)

    state, updates = tx.init(PARAMS), None
    for scale in (1.0, -0.5, 0.2):
        updates, state = step(jax.tree.map(lambda p, s=scale: s * p + s**2, PARAMS), state)
    return jax.tree.map(np.asarray, updates)


@pytest.fixture(scope="module")
def unchanged():
    return last_update(Change().row())


def test_no_change_is_the_raced_optimizer(unchanged):
    raced = last_update(OPTIMIZERS[ablations.CHANGED])
    jax.tree.map(np.testing.assert_array_equal, unchanged, raced)


@pytest.mark.parametrize(
    "name", ["f = 10", "blocks of 128", "outputs only", "no Nesterov", "no clip"]
)
def test_a_change_changes_the_updates(unchanged, name):
    changed = last_update(CHANGES[name].row(), CHANGES[name].point)
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), changed, unchanged)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(changed))
    assert max(differences.values()) > 1e-5


def clipped(grads):
    """The gradient that reaches the optimizer."""
    return optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())[0]


def test_a_basis_from_samples_is_that_of_the_gradients_where_each_sample_is_the_gradient():
    raced = last_update(Change().row(), sample=clipped)
    changed = last_update(CHANGES["basis from samples"].row(), sample=clipped)
    for name, update in changed.items():
        atol = 1e-4 * np.abs(raced[name]).max()
        np.testing.assert_allclose(update, raced[name], rtol=0, atol=atol)


def test_a_basis_from_samples_does_not_see_the_gradients():
    def bases(name, scale):
        def estimate(key, /, *, coordinates):
            return jax.tree.map(jnp.square, coordinates.turn(PARAMS))

        tx, _ = build(CHANGES[name].row() if name else Change().row(), H, 4)
        grads = jax.tree.map(lambda p: jnp.sin(scale * p), PARAMS)
        _, state = tx.update(grads, tx.init(PARAMS), PARAMS, hessian_fn=estimate)
        return jax.tree.map(np.asarray, optax.tree.get(state, "bases"))

    sampled = "basis from samples"
    jax.tree.map(np.testing.assert_array_equal, bases(sampled, 1.0), bases(sampled, -3.0))
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), bases("", 1.0), bases("", -3.0))
    assert max(jax.tree.leaves(differences)) > 0.1


def test_without_curvature_each_turned_coordinate_moves_by_the_learning_rate():
    change = CHANGES["no curvature"]
    update = last_update(change.row(), change.point)["up"]
    _, schedule = build(change.row(), H, 4)
    # The turn keeps the norm. Coordinates that are rounding do not move.
    moved = np.sum(update**2) / schedule(2) ** 2
    np.testing.assert_allclose(moved, np.round(moved), rtol=1e-4)
    assert moved > 4


def test_only_the_named_sides_are_turned():
    whole = matrix_axes(PARAMS)
    one_side = turned("left", None)(PARAMS)
    assert one_side == {**whole, "embedding": None, "up": whole["up"]._replace(turn="left")}
    assert turned("both", "right")(PARAMS) == whole


def test_rates_are_compared_on_the_seeds_that_all_of_them_have(monkeypatch):
    monkeypatch.setattr(ablations, "raced", lambda *_: {"losses": {"250": [2.0, 2.1, 2.2]}})
    tables = {str(factor): {0: 3.0, 1: 3.1} for factor in ablations.FACTORS}
    whole, missing = {**tables, "2.0": {0: 4.0}}, {"0.5": {0: 3.0}}
    found = with_race({"adamw": whole, "soap": missing}, 250)
    assert list(found) == ["adamw"]
    assert list(found["adamw"]) == ["0.25", "0.5", "1", "2.0", "4.0"]
    assert [list(losses.values()) for losses in found["adamw"].values()] == [
        [3.0],
        [3.0],
        [2.0],
        [4.0],
        [3.0],
    ]


@pytest.mark.parametrize("method", ["qr", "cholesky_qr2", "shifted_cholesky_qr3"])
def test_factorizations_are_orthonormal_to_rounding(method):
    found = orthonormalize.METHODS[method](orthonormalize.problem(2, 16, 4))
    assert orthonormalize.error(found) < 1e-5


def test_a_singular_factor_without_the_shift_breaks_cholesky_qr_and_not_qr():
    singular = orthonormalize.problem(2, 16, 2, rank=0.25, shift=False)
    assert orthonormalize.error(orthonormalize.cholesky_qr2(singular)) is None
    assert orthonormalize.error(orthonormalize.qr(singular)) < 1e-5


def test_newton_schulz_needs_a_factor_whose_eigenvalues_are_close():
    method = orthonormalize.newton_schulz
    assert orthonormalize.error(method(orthonormalize.problem(1, 8, 0.5))) < 1e-5
    assert orthonormalize.error(method(orthonormalize.problem(1, 8, 4))) > 0.5
