"""The warm-up study's changes to the algorithm, which override parts of the library's rule."""

import jax.numpy as jnp
import numpy as np
import pytest

import sophia_optax
from benchmarks.warmup import CHANGES, SHORT, STEPS, Change, changed_row, changed_sophia, in_kind
from examples.lm.optimizers import OPTIMIZERS, Hyperparameters, build

H = Hyperparameters(b1=0.8, b2=0.9, gamma=0.5)
GRADS = np.array([[0.3, 0.2, -0.01, 0.4], [-0.2, 0.1, 0.02, 0.4], [0.4, -0.3, 0.01, 0.1]])
ESTIMATES = np.array([[2.0, -2.0, 1e-3, 3.0], [1.0, -1.0, 1e-2, 5.0], [3.0, -1.0, 1e-3, 4.0]])


def steps_of(tx):
    """The updates of three steps, each with an estimate."""
    state, updates = tx.init(jnp.zeros(4)), []
    for grads, estimate in zip(GRADS, ESTIMATES, strict=True):
        update, state = tx.update(
            jnp.asarray(grads), state, hessian_fn=lambda _, e=estimate: jnp.asarray(e), refresh=True
        )
        updates.append(update)
    return np.array(updates)


def test_the_rule_as_it_is_is_the_librarys_with_the_papers_h():
    library = sophia_optax.scale_by_sophia(
        b1=H.b1, b2=H.b2, gamma=H.gamma, absolute_curvature=False
    )
    np.testing.assert_array_equal(steps_of(changed_sophia(H, Change())), steps_of(library))


IN_THE_RULE = [
    name
    for name, change in CHANGES.items()
    if change._replace(probes=1, dense=0, late_interval=10, clip_norm=None) != Change()
]


@pytest.mark.parametrize("name", IN_THE_RULE)
def test_a_change_changes_the_steps(name):
    changed = steps_of(changed_sophia(H, CHANGES[name]))
    assert np.isfinite(changed).all()
    assert np.abs(changed - steps_of(changed_sophia(H, Change()))).max() > 1e-4


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (Change(), 1.0),
        (Change(negative="size"), 0.04 / 1.0),
        (Change(negative="rest"), 0.0),
        (Change(negative="mean"), 0.04 / (0.5 * np.abs(ESTIMATES[0]).mean())),
    ],
)
def test_a_negative_curvature_steps_as_the_change_says(change, expected):
    # m is a fifth of the gradient; γ |h| is one, and the tensor's mean of |h| is that of ESTIMATES.
    np.testing.assert_allclose(steps_of(changed_sophia(H, change))[0, 1], expected, rtol=1e-5)


def test_squares_are_averaged_and_the_root_taken():
    first = steps_of(changed_sophia(H, Change(square=True)))[0]
    expected = 0.2 * GRADS[0] / (0.5 * np.abs(ESTIMATES[0]))
    np.testing.assert_allclose(first, np.clip(expected, -1, 1), rtol=1e-4)


def test_the_other_warmup_is_that_of_one_kind_alone():
    params = {"embedding": jnp.ones(2), "up": jnp.ones(2)}
    h = OPTIMIZERS["sophia_g"].tiny
    h = Hyperparameters(**{**vars(h), "warmup": SHORT, "weight_decay": 0.0})
    updates = {}
    for other in (None, "mlp"):
        tx, _ = build(changed_row("sophia_g", Change(), other), h, STEPS)
        state = tx.init(params)
        for _ in range(6):
            updates[other], state = tx.update(
                params, state, params, hessian_fn=lambda key: params, refresh=True
            )
    same = in_kind("embedding", params)
    for name in params:
        ratio = updates["mlp"][name] / updates[None][name]
        np.testing.assert_allclose(ratio, 1.0 if same[name].all() else 0.1, rtol=1e-3)
