"""Numbers that are not finite, injected into gradients and estimates at random steps of a run.

The full campaign runs with `python -m pytest -m stress`; its last results: docs/reliability.md.
"""

import itertools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import sophia_optax
from tests import problems
from tests.transforms import constant, jitted_update, sophia_state

PROBLEM = problems.CLASSIFICATION
PARAMS = PROBLEM.init(jnp.float32)
FLAT, UNRAVEL = ravel_pytree(PARAMS)
LEAF_ENDS = np.cumsum([0, *(leaf.size for leaf in jax.tree.leaves(PARAMS))])
STEPS, INTERVAL = 400, 2
# The largest float32 is finite, and its square, as in a global norm or an eigenbasis, is not.
LARGEST = float(np.finfo(np.float32).max)
NOT_FINITE = (np.nan, np.inf, -np.inf)

ESTIMATORS = {
    "hutchinson": lambda params: sophia_optax.hutchinson(PROBLEM.loss, params),
    "gauss_newton_bartlett": lambda params: sophia_optax.gauss_newton_bartlett(
        PROBLEM.outputs, params
    ),
}
GAMMAS = {
    "fixed": 0.05,
    "target": sophia_optax.win_rate_target(0.5),
    "shared target": sophia_optax.win_rate_target(0.5, per_tensor=False),
}


class Case(NamedTuple):
    """What is trained."""

    estimator: str
    gamma: str
    eigenbasis: bool

    def __str__(self) -> str:
        return "-".join((self.estimator, self.gamma, "eigenbasis" if self.eigenbasis else "plain"))


CASES = [Case(*each) for each in itertools.product(ESTIMATORS, GAMMAS, (False, True))]
# Each estimator, each kind of γ and each basis.
FEW_CASES = [
    Case("hutchinson", "fixed", True),
    Case("hutchinson", "target", False),
    Case("gauss_newton_bartlett", "fixed", False),
    Case("gauss_newton_bartlett", "shared target", True),
]


class Faults(NamedTuple):
    """What replaces coordinates at each step, `[steps, coordinates]`, and how much of it counts.

    Attributes:
        in_gradient: Which coordinates of the gradient.
        in_estimate: Which coordinates of the estimate.
        values: What they become.
        skipped: How many gradients are then not finite.
        rejected: How many estimates are then not finite.
        number: How many faults there are.
    """

    in_gradient: np.ndarray
    in_estimate: np.ndarray
    values: np.ndarray
    skipped: int = 0
    rejected: int = 0
    number: int = 0


NO_FAULTS = Faults(
    *(np.zeros((STEPS, FLAT.size), bool) for _ in range(2)), np.zeros((STEPS, 1), np.float32)
)


def faults(number: int, seed: int) -> Faults:
    """Faults at random steps, about half of them in estimates: a coordinate, a leaf, or all."""
    rng = np.random.default_rng(seed)
    in_gradient, in_estimate, values = (x.copy() for x in NO_FAULTS[:3])
    steps = set(rng.choice(STEPS, number, replace=False))
    # A step whose gradient is not finite is skipped, so that the transform does not count it.
    counted = skipped = rejected = 0
    for step in range(STEPS):
        if step in steps:
            due = counted % INTERVAL == 0
            values[step] = rng.choice(NOT_FINITE if due else (*NOT_FINITE, LARGEST, -LARGEST))
            leaf = rng.integers(len(LEAF_ENDS) - 1)
            first, last = LEAF_ENDS[leaf : leaf + 2]
            coordinate = rng.integers(first, last)
            where = [slice(coordinate, coordinate + 1), slice(first, last), slice(None)]
            (in_estimate if due else in_gradient)[step, where[rng.integers(3)]] = True
            rejected += due
            skipped += not due and not np.isfinite(values[step, 0])
            if not due and not np.isfinite(values[step, 0]):
                continue
        counted += 1
    return Faults(in_gradient, in_estimate, values, skipped, rejected, number)


def trained(case: Case) -> Any:
    """A compiled run with faults: its end, and the loss of each step and whether all is finite."""
    sophia = sophia_optax.sophia_g(
        optax.cosine_decay_schedule(0.03, STEPS),
        gamma=GAMMAS[case.gamma],
        update_interval=INTERVAL,
        weight_decay=0.0,
        eigenbasis=case.eigenbasis,
    )
    # apply_if_finite skips what is not finite, and the norm of what is too large is infinite.
    tx = optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), sophia), STEPS)

    def inject(tree: Any, where: jax.Array, value: jax.Array) -> Any:
        return UNRAVEL(jnp.where(where, value, ravel_pytree(tree)[0]))

    def step(carry: Any, fault: Any) -> Any:
        params, state = carry
        in_gradient, in_estimate, value = fault
        loss, grads = jax.value_and_grad(PROBLEM.loss)(params)
        estimate = ESTIMATORS[case.estimator](params)
        updates, state = tx.update(
            inject(grads, in_gradient, value),
            state,
            params,
            hessian_fn=lambda key, **own: inject(estimate(key, **own), in_estimate, value),
        )
        params = optax.apply_updates(params, updates)
        leaves = jax.tree.leaves((params, state))
        return (params, state), (loss, jnp.stack([jnp.isfinite(x).all() for x in leaves]).all())

    return jax.jit(lambda xs: jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), xs))


def check(case: Case, seeds: int, number: int) -> str:
    """Runs with faults, and without; returns what was counted."""
    run = trained(case)
    _, (clean, _) = run(NO_FAULTS[:3])
    skipped = rejected = 0
    difference = 0.0
    for seed in range(seeds):
        drawn = faults(number, seed)
        (_, state), (losses, finite) = run(drawn[:3])
        assert np.all(finite)
        assert int(state.total_notfinite) == drawn.skipped
        assert int(sophia_state(state).rejected) == drawn.rejected
        assert abs(losses[-1] - clean[-1]) < 1e-3 * (clean[0] - clean[-1])
        skipped, rejected = skipped + drawn.skipped, rejected + drawn.rejected
        difference = max(difference, float(abs(losses[-1] - clean[-1])))
    return (
        f"{case}: {skipped} gradients skipped, {rejected} estimates rejected, the final loss "
        f"{clean[-1]:.3f} differs by {difference:.1e} at most"
    )


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_faults_are_counted_stay_out_of_the_state_and_leave_the_final_loss(case: Case) -> None:
    check(case, seeds=1, number=16)


@pytest.mark.stress
@pytest.mark.parametrize("case", CASES, ids=str)
def test_1020_faults_are_counted_stay_out_of_the_state_and_leave_the_final_loss(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = check(case, seeds=5, number=17)
    with capsys.disabled():
        sys.stdout.write(f"\n{counted}\n")


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_a_fault_on_one_device_of_eight_is_rejected_on_all(bad: float) -> None:
    rows = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    ones, mixed = np.ones((16, 2), np.float32), np.ones((16, 2), np.float32)
    mixed[5, 1] = bad
    params, estimate, with_fault = jax.device_put((ones, ones, mixed), rows)
    tx = sophia_optax.scale_by_sophia(
        gamma=sophia_optax.win_rate_target(0.5), update_interval=1, seed=1
    )
    with jax.set_mesh(rows.mesh):
        state = jitted_update(tx, constant(estimate))(params, tx.init(params), params)[1]
        after = jitted_update(tx, constant(with_fault))(params, state, params)[1]
    assert (int(after.refreshes), int(after.rejected)) == (1, 1)
    np.testing.assert_array_equal(after.nu, state.nu)
    np.testing.assert_array_equal(after.gamma, state.gamma)


def steps_to_recover(tx: Any, estimator: str, seed: int) -> int:
    """After ten batches of garbage: steps until the loss is again what it was before, plus 10 %.

    A perceptron learns the digits from batches of 128; from step 300 on ten batches are noise a
    thousand times as large as the images, with random labels.
    """
    digits = load_digits()
    images, labels = jnp.float32(digits.data / 16), jnp.int32(digits.target)
    first, number = 300, 10

    def logits(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] + params["c"]

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()

    def step(carry: Any, t: jax.Array) -> Any:
        params, state = carry
        key = jax.random.fold_in(jax.random.key(seed), t)
        rows = jax.random.randint(key, (128,), 0, len(labels))
        garbage = (t >= first) & (t < first + number)
        x = jnp.where(garbage, 1e3 * jax.random.normal(key, (128, 64)), images[rows])
        y = jnp.where(garbage, jax.random.randint(key, (128,), 0, 10), labels[rows])
        hessian_fn = {
            "hutchinson": lambda: sophia_optax.hutchinson(lambda p: loss(p, x, y), params),
            "gauss_newton_bartlett": lambda: sophia_optax.gauss_newton_bartlett(
                lambda p: logits(p, x), params
            ),
        }[estimator]()
        grads = jax.grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params, hessian_fn=hessian_fn)
        params = optax.apply_updates(params, updates)
        return (params, state), loss(params, images, labels)

    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "w": jax.random.normal(keys[0], (64, 64)) / 8,
        "b": jnp.zeros(64),
        "v": jax.random.normal(keys[1], (64, 10)) / 8,
        "c": jnp.zeros(10),
    }
    steps = jnp.arange(900)
    losses = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), steps)[1])(params)
    recovered = losses[first + number :] <= 1.1 * losses[first - 1]
    return int(jnp.argmax(recovered)) + 1 if recovered.any() else len(steps)


@pytest.mark.stress
@pytest.mark.parametrize("clipped", [False, True])
def test_ten_batches_of_garbage_cost_no_more_steps_than_with_adamw(
    clipped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    entrants = {
        "adamw 3e-3": (optax.with_extra_args_support(optax.adamw(3e-3)), "gauss_newton_bartlett"),
        "adamw 1e-2": (optax.with_extra_args_support(optax.adamw(1e-2)), "gauss_newton_bartlett"),
        "sophia_h": (
            sophia_optax.sophia_h(3e-3, gamma=sophia_optax.win_rate_target()),
            "hutchinson",
        ),
        "sophia_g": (
            sophia_optax.sophia_g(3e-3, gamma=sophia_optax.win_rate_target()),
            "gauss_newton_bartlett",
        ),
    }
    clip = optax.clip_by_global_norm(1.0) if clipped else optax.identity()
    steps = {
        name: [steps_to_recover(optax.chain(clip, tx), estimator, seed) for seed in range(5)]
        for name, (tx, estimator) in entrants.items()
    }
    with capsys.disabled():
        sys.stdout.write(f"\nclipped: {clipped}; steps to recover, by seed: {steps}\n")
    median = {name: np.median(found) for name, found in steps.items()}
    assert max(median["sophia_h"], median["sophia_g"]) <= max(median["adamw 1e-2"], 20)
