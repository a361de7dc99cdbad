"""What an optax optimizer owes its users, for every alias with every estimator.

The points are those of optax's own table for contributed optimizers, and the further ones that
users of optax rely on: wrappers, abstract init, donation, vmap, trees with holes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import sophia_optax
from tests import problems

Params = Any
DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)


class Case(NamedTuple):
    """An alias, the estimator that it is given, and keywords that are switched on."""

    alias: str
    estimator: str
    switches: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "-".join([self.alias, self.estimator, *self.switches])

    def factory(self) -> Any:
        return functools.partial(
            getattr(sophia_optax, self.alias), **dict.fromkeys(self.switches, True)
        )

    def optimizer(self, learning_rate: Any = 1e-2, **kwargs: Any) -> Any:
        return self.factory()(learning_rate, **kwargs)

    def extra_args(self, problem: problems.Problem, params: Params) -> dict[str, Any]:
        return ESTIMATORS[self.estimator](problem, params)


ESTIMATORS: dict[str, Callable[[problems.Problem, Params], dict[str, Any]]] = {
    "hutchinson": lambda problem, params: {
        "hessian_fn": sophia_optax.hutchinson(problem.loss, params)
    },
    "gauss_newton_bartlett": lambda problem, params: {
        "hessian_fn": sophia_optax.gauss_newton_bartlett(
            problem.outputs, params, likelihood=getattr(sophia_optax, problem.likelihood)
        )
    },
    "obj_fn": lambda problem, params: {"obj_fn": problem.loss},
}

CASES = (
    Case("sophia_h", "hutchinson"),
    Case("sophia_h", "obj_fn"),
    Case("sophia_g", "gauss_newton_bartlett"),
    Case("sophia_h", "gauss_newton_bartlett"),
    Case("sophia_g", "hutchinson"),
)
EIGENBASIS = Case("sophia_g", "gauss_newton_bartlett", ("eigenbasis",))
each_case = pytest.mark.parametrize("case", CASES, ids=str)
# The ways in which the aliases are meant to be used.
each_usual_case = pytest.mark.parametrize("case", CASES[:3], ids=str)
# The paper's two optimizers, where nothing hangs on how the estimator gets in.
PAPER_CASES = (CASES[0], CASES[2], EIGENBASIS)
each_paper_case = pytest.mark.parametrize("case", PAPER_CASES, ids=str)


def make_step(
    tx: Any, case: Case, problem: problems.Problem, **extra_args: Any
) -> Callable[[Params, Any], tuple[Params, Any]]:
    """A training step as a user of optax writes it."""

    def step(params: Params, state: Any) -> tuple[Params, Any]:
        grads = jax.grad(problem.loss)(params)
        updates, state = tx.update(
            grads, state, params, **case.extra_args(problem, params), **extra_args
        )
        return optax.apply_updates(params, updates), state

    return step


def run(
    tx: Any, case: Case, problem: problems.Problem, steps: int, dtype: Any = jnp.float32
) -> tuple[Params, Any]:
    """`steps` steps from the problem's start, in one program that is the same for any number."""
    step = make_step(tx, case, problem)

    @jax.jit
    def train(params: Params, steps: jax.Array) -> tuple[Params, Any]:
        start = (params, tx.init(params))
        return jax.lax.fori_loop(0, steps, lambda _, carry: step(*carry), start)

    return train(problem.init(dtype), steps)


def compiled_update(tx: Any, case: Case, problem: problems.Problem) -> Callable[..., Any]:
    """`tx.update` with the case's estimator, from gradients, state and params."""

    @jax.jit
    def update(grads: Any, state: Any, params: Params) -> tuple[Any, Any]:
        return tx.update(grads, state, params, **case.extra_args(problem, params))

    return update


@functools.cache
def update_of_the_whole(case: Case) -> tuple[Params, Any, Any, Any]:
    """Params and gradients of `problems.REGRESSION`, and their first update and state."""
    problem, tx = problems.REGRESSION, case.optimizer()
    params = problem.init(jnp.float32)
    grads = jax.jit(jax.grad(problem.loss))(params)
    return params, grads, *compiled_update(tx, case, problem)(grads, tx.init(params), params)


def avals(tree: Any) -> Any:
    """Structure, and the shape, dtype and weak type of every leaf."""
    return jax.tree.map(lambda x: str(jax.typeof(x)), tree)


def sophia_state(state: Any) -> sophia_optax.ScaleBySophiaState:
    (found,) = optax.tree.get_all_with_path(state, "ScaleBySophiaState")
    return found[1]


# Extra arguments and compilation


@each_case
def test_update_ignores_extra_arguments_it_does_not_know(case: Case) -> None:
    problem, tx = problems.ROSENBROCK, case.optimizer()
    params = problem.init(jnp.float32)
    state = tx.init(params)
    plain = jax.jit(make_step(tx, case, problem))(params, state)
    extra = jax.jit(make_step(tx, case, problem, value=1.0, a_thing_of_another_optimizer="x"))(
        params, state
    )
    chex.assert_trees_all_equal(plain, extra)


@each_usual_case
def test_second_step_does_not_recompile(case: Case) -> None:
    problem, tx = problems.MIXED, case.optimizer()
    chex.clear_trace_counter()
    # Donated as in the test of donation, whose program it shares.
    step = jax.jit(chex.assert_max_traces(make_step(tx, case, problem), n=1), donate_argnums=(0, 1))
    params = problem.init(jnp.float32)
    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)


# Convergence


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        pytest.param(case, problem, id=f"{case}-{problem.name}")
        for case in (*CASES, EIGENBASIS)
        # An alias with the other's estimator: two targets are enough.
        for problem in problems.TARGETS[: 4 if case in CASES[:3] else 2]
    ],
)
def test_converges(case: Case, problem: problems.Problem) -> None:
    params, _ = run(case.optimizer(), case, problem, steps=problem.steps)
    if problem.solution is not None:
        chex.assert_trees_all_close(params, problem.solution, rtol=3e-2, atol=3e-2)
    else:
        assert problem.loss(params) < problem.target_loss


# Schedules and injected hyperparameters


@each_paper_case
def test_constant_schedule_is_a_constant_learning_rate(case: Case) -> None:
    problem = problems.PARABOLA
    constant, _ = run(case.optimizer(1e-2), case, problem, steps=12)
    schedule, _ = run(case.optimizer(optax.constant_schedule(1e-2)), case, problem, steps=12)
    chex.assert_trees_all_equal(constant, schedule)


def test_learning_rate_schedule_is_read_at_each_step() -> None:
    problem, case = problems.PARABOLA, PAPER_CASES[0]
    schedule = optax.piecewise_constant_schedule(1e-2, {3: 0.0})
    stopped, _ = run(case.optimizer(schedule), case, problem, steps=9)
    after_three, _ = run(case.optimizer(1e-2), case, problem, steps=3)
    chex.assert_trees_all_close(stopped, after_three, rtol=1e-6)


@each_paper_case
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16), ids=("float32", "bfloat16"))
def test_injected_hyperparameters_give_equal_updates_and_state(case: Case, dtype: Any) -> None:
    """In bfloat16 `hyperparam_dtype=float32` is needed: b2 = 0.99 would round to 0.988."""
    problem = problems.MIXED
    params = problem.init(dtype)
    grads = jax.jit(jax.grad(problem.loss))(params)
    plain = case.optimizer()
    injected = optax.inject_hyperparams(case.factory(), hyperparam_dtype=jnp.float32)(
        learning_rate=1e-2
    )

    def two_updates(tx: Any) -> Any:
        update, state = compiled_update(tx, case, problem), tx.init(params)
        for _ in range(2):
            updates, state = update(grads, state, params)
        return updates, state

    updates, state = two_updates(plain)
    injected_updates, injected_state = two_updates(injected)
    assert avals(injected_updates) == avals(updates)
    assert avals(injected_state.inner_state) == avals(state)
    rtol = max(1e-5, float(jnp.finfo(dtype).eps))
    chex.assert_trees_all_close(injected_updates, updates, rtol=rtol, atol=1e-8)
    chex.assert_trees_all_close(injected_state.inner_state, state, rtol=rtol, atol=1e-8)
    chex.assert_trees_all_close(
        sophia_state(injected_state).nu, sophia_state(state).nu, rtol=1e-5, atol=1e-8
    )


def test_every_numeric_hyperparameter_takes_a_schedule_when_injected() -> None:
    problem = problems.PARABOLA
    params = problem.init(jnp.float32)
    values = {
        "learning_rate": 1e-2,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-10,
        "gamma": 0.02,
        "clip_threshold": 0.8,
        "update_interval": 3,
        "weight_decay": 0.01,
    }
    plain = sophia_optax.sophia_h(**values)
    injected = optax.inject_hyperparams(sophia_optax.sophia_h)(
        **{name: optax.constant_schedule(value) for name, value in values.items()}
    )
    case = Case("sophia_h", "hutchinson")
    expected, expected_state = run(plain, case, problem, steps=8)
    actual, actual_state = run(injected, case, problem, steps=8)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)
    chex.assert_trees_all_close(
        sophia_state(actual_state), sophia_state(expected_state), rtol=1e-5, atol=1e-8
    )
    assert set(actual_state.hyperparams) >= set(values)
    assert avals(injected.init(params).inner_state) == avals(plain.init(params))


def test_injected_gamma_and_update_interval_follow_their_schedules() -> None:
    """The interval goes from 2 to 4 at step 4, gamma from 1e-6 (a sign step) to 1e6 (no step)."""
    problem, case = problems.PARABOLA, Case("sophia_h", "hutchinson")
    tx = optax.inject_hyperparams(sophia_optax.scale_by_sophia)(
        gamma=lambda count: jnp.where(count < 5, 1e-6, 1e6),
        update_interval=lambda count: jnp.where(count < 4, 2, 4),
    )
    params = problem.init(jnp.float32)

    @jax.jit
    def update(state: Any) -> Any:
        grads = jax.grad(problem.loss)(params)
        return tx.update(grads, state, params, **case.extra_args(problem, params))

    state = tx.init(params)
    refreshes = []
    for step in range(9):
        updates, state = update(state)
        refreshes.append(int(state.inner_state.refreshes))
        size = np.max(np.abs(updates))
        assert size == 1.0 if step < 5 else size < 1e-3
    assert refreshes == [1, 1, 2, 2, 3, 3, 3, 3, 4]


def test_array_hyperparameters_are_accepted() -> None:
    problem, case = problems.PARABOLA, PAPER_CASES[0]
    floats = {"b1": 0.9, "b2": 0.95, "eps": 1e-10, "gamma": 0.02, "clip_threshold": 0.8}
    arrays = {name: jnp.asarray(value) for name, value in floats.items()}
    expected, _ = run(case.optimizer(**floats, update_interval=3), case, problem, steps=5)
    actual, _ = run(
        case.optimizer(jnp.asarray(1e-2), **arrays, update_interval=jnp.asarray(3)),
        case,
        problem,
        steps=5,
    )
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)


# Dtypes, structures, weak types


@each_paper_case
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_updates_params_and_state_keep_their_dtypes(case: Case, dtype: Any) -> None:
    problem, tx = problems.PARABOLA, case.optimizer()
    with jax.enable_x64(dtype == jnp.float64):
        params = problem.init(dtype)
        state = tx.init(params)

        @jax.jit
        def step(params: Params, state: Any) -> tuple[Any, Params, Any]:
            value, grads = jax.value_and_grad(problem.loss)(params)
            extra_args = case.extra_args(problem, params)
            updates, state = tx.update(grads, state, params, **extra_args, value=value)
            return updates, optax.apply_updates(params, updates), state

        updates, new_params, new_state = step(params, state)
        assert updates.dtype == dtype
        assert new_params.dtype == dtype
        assert sophia_state(state).mu.dtype == dtype
        assert sophia_state(state).nu.dtype == jnp.float32
        assert avals(new_state) == avals(state)
        assert np.all(np.isfinite(np.asarray(updates, np.float64)))


@each_paper_case
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32), ids=("bfloat16", "float32"))
def test_state_is_stable_through_cond_and_scan(case: Case, dtype: Any) -> None:
    """`cond` and `scan` refuse a state whose structure, shape, dtype or weak type changes."""
    problem, tx = problems.MIXED, case.optimizer()
    step = make_step(tx, case, problem)

    def maybe_step(carry: Any, take: jax.Array) -> tuple[Any, None]:
        return jax.lax.cond(take, lambda c: step(*c), lambda c: c, carry), None

    params = problem.init(dtype)
    carry = (params, tx.init(params))
    after, _ = jax.jit(lambda c: jax.lax.scan(maybe_step, c, jnp.array([True, False, True])))(carry)
    assert avals(after) == avals(carry)
    assert sophia_state(after[1]).count == 2
    chex.assert_trees_all_equal(avals(jax.eval_shape(tx.init, params)), avals(carry[1]))


def test_float64_params_are_moved_in_float64() -> None:
    case, problem = PAPER_CASES[0], problems.ROSENBROCK
    with jax.enable_x64(True):
        params, _ = run(case.optimizer(nu_dtype=None), case, problem, steps=20, dtype=jnp.float64)
        single, _ = run(case.optimizer(), case, problem, steps=20, dtype=jnp.float32)
        assert np.any(np.float64(np.float32(params)) != params)
        chex.assert_trees_all_close(np.float32(params), single, rtol=1e-4)


# Wrappers


@each_paper_case
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32), ids=("bfloat16", "float32"))
def test_multi_steps_is_one_step_on_the_mean_gradient(case: Case, dtype: Any) -> None:
    problem, every_k = problems.MIXED, 3
    tx = case.optimizer()
    multi = optax.MultiSteps(tx, every_k)
    params = problem.init(dtype)
    grads = jax.jit(jax.grad(problem.loss))(params)

    update, state = compiled_update(multi, case, problem), multi.init(params)
    for mini_step in range(every_k):
        updates, state = update(optax.tree.scale(mini_step, grads), state, params)
        if mini_step < every_k - 1:
            chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
            assert sophia_state(state).count == 0
    expected, expected_state = compiled_update(tx, case, problem)(grads, tx.init(params), params)
    tolerance = 2 * float(jnp.finfo(dtype).eps)
    chex.assert_trees_all_close(updates, expected, rtol=tolerance)
    chex.assert_trees_all_close(state.inner_opt_state, expected_state, rtol=tolerance)
    assert avals(state) == avals(multi.init(params))


@each_paper_case
def test_masked_moves_and_tracks_only_what_it_owns(case: Case) -> None:
    """The estimator sees the whole tree, and the transform takes the leaves that it owns."""
    problem = problems.REGRESSION
    mask = {"hidden": True, "out": {"w": True, "b": False}}
    tx = optax.masked(case.optimizer(), mask)
    params, grads, expected, expected_state = update_of_the_whole(case)
    updates, state = compiled_update(tx, case, problem)(grads, tx.init(params), params)
    chex.assert_trees_all_equal(updates["out"]["b"], grads["out"]["b"])
    chex.assert_trees_all_close(updates["out"]["w"], expected["out"]["w"], rtol=1e-6)
    chex.assert_trees_all_close(updates["hidden"], expected["hidden"], rtol=1e-6)
    nu = sophia_state(state).nu
    assert nu["out"]["b"] == optax.MaskedNode()
    chex.assert_trees_all_close(nu["hidden"], sophia_state(expected_state).nu["hidden"], rtol=1e-6)
    assert avals(tx.init(params)) == avals(state)


@each_paper_case
def test_partition_gives_each_optimizer_its_leaves(case: Case) -> None:
    problem = problems.REGRESSION
    labels = {"hidden": "sophia", "out": {"w": "sophia", "b": "sgd"}}
    tx = optax.partition({"sophia": case.optimizer(), "sgd": optax.sgd(0.1)}, labels)
    params, grads, expected, _ = update_of_the_whole(case)
    updates, state = compiled_update(tx, case, problem)(grads, tx.init(params), params)
    chex.assert_trees_all_close(updates["out"]["b"], -0.1 * grads["out"]["b"], rtol=1e-6)
    chex.assert_trees_all_close(updates["hidden"], expected["hidden"], rtol=1e-6)
    assert avals(tx.init(params)) == avals(state)


def test_two_sophias_share_a_tree_through_partition() -> None:
    problem = problems.REGRESSION
    tx = optax.partition(
        {"fast": sophia_optax.sophia_h(1e-2), "slow": sophia_optax.sophia_h(1e-3)},
        {"hidden": "fast", "out": "slow"},
    )
    params, _ = run(tx, Case("sophia_h", "hutchinson"), problem, steps=1)
    start = problem.init(jnp.float32)
    moved = jax.tree.map(lambda x, y: np.abs(np.subtract(x, y)).max(), params, start)
    assert max(jax.tree.leaves(moved["out"])) <= 1.01e-3 < max(jax.tree.leaves(moved["hidden"]))


@each_paper_case
def test_apply_if_finite_skips_a_step_with_a_broken_gradient(case: Case) -> None:
    problem = problems.MIXED
    tx = optax.apply_if_finite(case.optimizer(), max_consecutive_errors=2)
    params = problem.init(jnp.float32)
    grads = jax.jit(jax.grad(problem.loss))(params)
    update = compiled_update(tx, case, problem)
    _, before = update(grads, tx.init(params), params)
    updates, after = update(jax.tree.map(lambda g: g * jnp.nan, grads), before, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    chex.assert_trees_all_equal(after.inner_state, before.inner_state)
    assert after.total_notfinite == 1
    updates, _ = update(grads, after, params)
    assert all(jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves(updates))


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("sophia", tx)),
    "chain_in_chain": lambda tx: optax.chain(optax.chain(tx), optax.identity()),
    "with_extra_args_support": optax.with_extra_args_support,
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.masked(tx, True),
    "partition": lambda tx: optax.partition({"all": tx}, "all"),
    "reduce_on_plateau": lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau()),
    "mechanize": lambda tx: optax.contrib.mechanize(tx, weight_decay=0.0, s_init=0.1),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, learning_rate=1e-2),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@each_paper_case
def test_wrapped_optimizer_trains(case: Case, wrapper: str) -> None:
    """Through each wrapper the loss falls, the state is stable and the estimator is reached."""
    problem = problems.PARABOLA
    tx = WRAPPERS[wrapper](case.optimizer())
    step = make_step(tx, case, problem, value=jnp.asarray(1.0))
    params = problem.init(jnp.float32)
    state = tx.init(params)

    @jax.jit
    def train(params: Params, state: Any) -> Any:
        return jax.lax.scan(lambda carry, _: (step(*carry), None), (params, state), length=40)[0]

    trained, after = train(params, state)
    assert avals(after) == avals(state)
    assert problem.loss(trained) < problem.loss(params)
    assert sophia_state(after).refreshes == (2 if wrapper == "multi_steps" else 4)


# The state, seen from outside


@each_paper_case
def test_map_params_reaches_the_moments_and_nothing_else(case: Case) -> None:
    problem, tx = problems.MIXED, case.optimizer()
    params = problem.init(jnp.float32)
    state = tx.init(params)
    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda x: x, state), state)
    # The bases of `in_eigenbasis` are no tree like the params, and come as they are, in one piece.
    add_seven = functools.partial(jax.tree.map, lambda x: x + 7)
    marked = sophia_state(
        optax.tree.map_params(tx, lambda x: x + 1.0, state, transform_non_params=add_seven)
    )
    ones = jax.tree.map(jnp.ones_like, params)
    chex.assert_trees_all_equal(marked.mu, ones)
    chex.assert_trees_all_equal(marked.nu, ones)
    assert marked.count == marked.refreshes == marked.rejected == 7


def test_map_params_sees_through_a_mask() -> None:
    problem = problems.REGRESSION
    tx = optax.masked(sophia_optax.sophia_h(1e-2), {"hidden": True, "out": False})
    state = tx.init(problem.init(jnp.float32))
    marked = sophia_state(optax.tree.map_params(tx, lambda x: x + 1.0, state))
    chex.assert_trees_all_equal(marked.nu["hidden"]["b"], jnp.ones(8))


@each_paper_case
def test_init_is_abstract(case: Case) -> None:
    """`init` needs shapes and dtypes only, so that a sharded state can be planned before it is."""
    params, tx = problems.MIXED.init(jnp.bfloat16), case.optimizer()
    concrete = tx.init(params)
    abstract = jax.eval_shape(tx.init, params)
    planned = tx.init(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params))
    for other in (abstract, planned):
        chex.assert_trees_all_equal_shapes_and_dtypes(concrete, other)


@each_paper_case
def test_tree_get_and_set_reach_the_state(case: Case) -> None:
    tx = case.optimizer(optax.constant_schedule(1e-2))
    params = problems.PARABOLA.init(jnp.float32)
    state = tx.init(params)
    assert optax.tree.get(state, "refreshes") == 0
    chex.assert_trees_all_equal(optax.tree.get(state, "nu"), jnp.zeros(3))
    state = optax.tree.set(state, nu=jnp.full(3, 2.0), rejected=jnp.asarray(5))
    chex.assert_trees_all_equal(optax.tree.get(state, "nu"), jnp.full(3, 2.0))
    found = optax.tree.get(state, "ScaleBySophiaState")
    assert isinstance(found, sophia_optax.ScaleBySophiaState)
    assert found.rejected == 5


# Trees of every shape


@each_paper_case
def test_none_leaves_stay_none(case: Case) -> None:
    """As `equinox.partition` and `nnx` leave them: holes in params and gradients alike."""
    whole = problems.PARABOLA
    problem = problems.Problem(
        name="with_holes",
        init=lambda dtype: {"x": whole.init(dtype), "hole": None},
        outputs=lambda params: whole.outputs(params["x"]),
        loss=lambda params: whole.loss(params["x"]),
        likelihood=whole.likelihood,
    )
    params, state = run(case.optimizer(), case, problem, steps=3)
    expected, _ = run(case.optimizer(), case, whole, steps=3)
    assert params["hole"] is None
    assert sophia_state(state).nu["hole"] is None
    assert jnp.all(jnp.isfinite(params["x"]))
    if case.estimator == "gauss_newton_bartlett":
        chex.assert_trees_all_equal(params["x"], expected)


@each_paper_case
def test_a_bare_scalar_is_a_tree(case: Case) -> None:
    problem = problems.Problem(
        name="scalar",
        init=lambda dtype: jnp.asarray(2.0, dtype),
        outputs=lambda x: jnp.reshape(x - 1, (1,)),
        loss=lambda x: jnp.square(x - 1) / 2,
        likelihood="gaussian",
    )
    params, state = run(case.optimizer(), case, problem, steps=400)
    assert params.shape == ()
    assert abs(float(params) - 1) < 1e-2
    assert sophia_state(state).nu.shape == ()


@each_paper_case
def test_stacked_layers_train_and_so_they_do_rematerialized(case: Case) -> None:
    """A scan over a stack of layers; `jax.checkpoint` around one changes no number."""
    layers, width, steps = 3, 4, 40
    inputs = jnp.asarray(np.random.default_rng(1).normal(size=(16, width)), jnp.float32)

    def layer(hidden: jax.Array, weights: jax.Array) -> tuple[jax.Array, None]:
        return hidden + jnp.tanh(hidden @ weights), None

    def problem(body: Callable[..., Any]) -> problems.Problem:
        def residuals(params: Params) -> jax.Array:
            return jax.lax.scan(body, inputs, params)[0] - jnp.roll(inputs, 1, axis=1)

        return problems.Problem(
            name="stacked",
            init=lambda dtype: jnp.full((layers, width, width), 0.1, dtype),
            outputs=residuals,
            loss=lambda params: jnp.mean(jnp.square(residuals(params))) / 2,
            likelihood="gaussian",
        )

    plain, remat = problem(layer), problem(jax.checkpoint(layer))
    params, state = run(case.optimizer(), case, plain, steps)
    chex.assert_trees_all_equal_shapes(sophia_state(state).nu, params)
    assert plain.loss(params) < 0.6 * plain.loss(plain.init(jnp.float32))
    remat_params, _ = run(case.optimizer(), case, remat, steps)
    chex.assert_trees_all_close(remat_params, params, rtol=1e-3, atol=1e-4)


# Arguments that are not there


@pytest.mark.parametrize("alias", ("sophia_h", "sophia_g"))
def test_missing_arguments_are_named(alias: str) -> None:
    tx = getattr(sophia_optax, alias)(1e-2)
    params = problems.PARABOLA.init(jnp.float32)
    state = tx.init(params)
    with pytest.raises(ValueError, match="hessian_fn"):
        tx.update(params, state, params)
    with pytest.raises(ValueError, match="params"):
        tx.update(params, state, hessian_fn=lambda _: params)


@each_paper_case
def test_flatten_is_refused_with_a_reason(case: Case) -> None:
    problem, tx = problems.MIXED, optax.flatten(case.optimizer())
    params = problem.init(jnp.float32)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"optax\.flatten"):
        tx.update(params, state, params, **case.extra_args(problem, params))


# Buffers


@each_paper_case
@pytest.mark.parametrize("jitted", (False, True), ids=("eager", "jitted"))
def test_a_fresh_state_shares_no_buffer_and_can_be_donated(case: Case, jitted: bool) -> None:
    problem, tx = problems.MIXED, case.optimizer()
    params = problem.init(jnp.float32)
    state = (jax.jit(tx.init) if jitted else tx.init)(params)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
    assert len(set(buffers)) == len(buffers)
    step = jax.jit(make_step(tx, case, problem), donate_argnums=(0, 1))
    unread = sophia_state(state).gamma  # a fixed gamma is shown in the state, not read from it
    old = [x for x in jax.tree.leaves(state) if x is not unread]
    for _ in range(2):
        params, state = step(params, state)
    assert all(x.is_deleted() for x in old)
    assert sophia_state(state).count == 2


# vmap


@each_paper_case
def test_vmap_over_optimizers_is_each_optimizer_alone(case: Case) -> None:
    problem, tx = problems.PARABOLA, case.optimizer(update_interval=2)
    starts = jnp.asarray([[0.0, 1.0, 2.0], [3.0, -2.0, 5.0]])
    step = make_step(tx, case, problem)

    def train(params: Params) -> Any:
        start = (params, tx.init(params))
        return jax.lax.scan(lambda carry, _: (step(*carry), None), start, length=3)[0]

    together = jax.jit(jax.vmap(train))(starts)
    alone = [jax.jit(train)(start) for start in starts]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    chex.assert_trees_all_close(together, expected, rtol=1e-5, atol=1e-7)


@each_paper_case
@pytest.mark.parametrize("refresh", (True, False))
def test_a_fixed_refresh_compiles_to_no_branch(case: Case, refresh: bool) -> None:
    """So a vmapped trainer that compiles two steps pays for curvature in one of them alone."""
    problem, tx = problems.PARABOLA, case.optimizer()
    params = jnp.zeros((4, 3))
    state = jax.vmap(tx.init)(params)
    step = jax.vmap(make_step(tx, case, problem, refresh=refresh))
    assert "cond[" not in str(jax.make_jaxpr(step)(params, state))
    _, after = jax.jit(step)(params, state)
    chex.assert_trees_all_equal(sophia_state(after).refreshes, jnp.full(4, int(refresh)))


def test_first_step_moves_downhill_by_the_learning_rate_where_clipped() -> None:
    problem, learning_rate = problems.PARABOLA, 1e-2
    start = problem.init(jnp.float32)
    params, _ = run(
        sophia_optax.sophia_h(learning_rate, b1=0.0, gamma=1e-8, weight_decay=0.0),
        Case("sophia_h", "hutchinson"),
        problem,
        steps=1,
    )
    moved = np.asarray(start - params)
    expected = learning_rate * np.sign(np.asarray(start) - np.asarray(problem.solution))
    np.testing.assert_allclose(moved, expected, atol=1e-6)
