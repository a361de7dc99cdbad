"""The eigenbasis: what is turned, the laws of the transform, what bad gradients do to it."""

import functools
import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import orbax.checkpoint
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sophia_optax
from sophia_optax import MatrixAxes, _eigenbasis, in_eigenbasis
from sophia_optax._eigenbasis import householder_qr, orthonormal, shifted_cholesky_qr
from sophia_optax._matrix_axes import matrix_view
from sophia_optax._matrix_view import MatrixView
from sophia_optax._spread_matrices import refresh
from sophia_optax._turned_leaves import EigenbasisCoordinates, TurnedLeaves
from tests import hlo, oracles
from tests.transforms import Calls

Tree = Any
KEYS = jax.random.split(jax.random.key(0), 8)
X = jax.random.normal(KEYS[0], (32, 6)) * jnp.array([10.0, 3.0, 1.0, 1.0, 0.3, 0.1])
LABELS = jnp.argmax(X @ jax.random.normal(KEYS[1], (6, 4)), axis=-1)
PARAMS = {
    "up": 0.3 * jax.random.normal(KEYS[2], (6, 5)),
    "bias": jnp.zeros(5),
    "down": 0.3 * jax.random.normal(KEYS[3], (5, 4)),
}


def logits(params: Tree) -> jax.Array:
    return jnp.tanh(X @ params["up"] + params["bias"]) @ params["down"]


def loss(params: Tree) -> jax.Array:
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits(params), LABELS)
    return losses.mean()


@functools.cache
def gradients() -> Tree:
    """Those of `loss` at `PARAMS`."""
    return jax.jit(jax.grad(loss))(PARAMS)


def soap(**keywords: Any) -> optax.GradientTransformationExtraArgs:
    return in_eigenbasis(optax.scale_by_adam(0.9, 0.95, nesterov=True), **keywords)


ESTIMATORS = {
    "hutchinson": lambda params: sophia_optax.hutchinson(loss, params),
    "gauss_newton_bartlett": lambda params: sophia_optax.gauss_newton_bartlett(logits, params),
}


@functools.cache  # so that tests share what `jitted` compiles
def sophia(**keywords: Any) -> optax.GradientTransformationExtraArgs:
    scale = sophia_optax.scale_by_sophia(
        0.8, 0.9, gamma=1.0, update_interval=2, nesterov=True, seed=3
    )
    return in_eigenbasis(scale, **{"basis_interval": 3, **keywords})


@functools.cache
def jitted(tx: Any, estimator: str | None = None) -> Any:
    @jax.jit
    def step(params: Tree, state: Any) -> tuple[Tree, Any]:
        extra = {} if estimator is None else {"hessian_fn": ESTIMATORS[estimator](params)}
        updates, state = tx.update(jax.grad(loss)(params), state, params, **extra)
        return optax.apply_updates(params, jax.tree.map(lambda u: -0.02 * u, updates)), state

    return step


def train(
    tx: Any, steps: int, params: Tree = None, state: Any = None, estimator: str | None = None
) -> tuple[Tree, Any]:
    params = PARAMS if params is None else params
    state = tx.init(params) if state is None else state
    step = jitted(tx, estimator)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


# What is turned


@pytest.mark.parametrize(
    ("shape", "left", "right", "keywords", "expected"),
    [
        ((6, 4), (0,), (1,), {}, (1, 1, 6, 1, 4)),
        ((3, 6, 4), (-2,), (-1,), {}, (3, 1, 6, 1, 4)),
        ((3, 6, 2, 4), (1,), (2, 3), {}, (3, 1, 6, 1, 8)),
        ((2, 6, 2, 3, 4), (1,), (3, 4), {}, (4, 1, 6, 1, 12)),
        ((12, 8), (0,), (1,), {"block_size": 4}, (1, 3, 4, 2, 4)),
        ((10, 8), (0,), (1,), {"block_size": 4}, (1, 5, 2, 2, 4)),
        ((7, 8), (0,), (1,), {"block_size": 6}, (1, 1, 7, 2, 4)),  # 7 has no divisor to cut at
        ((20, 4), (0,), (1,), {"max_size": 8}, (1, 1, 20, 1, 4)),
        # A side that is not turned is not cut.
        ((20, 4), (0,), (1,), {"max_size": 8, "block_size": 4}, (1, 1, 20, 1, 4)),
    ],
)
def test_arrays_are_read_as_stacks_of_matrices_in_blocks(
    shape: Any, left: Any, right: Any, keywords: Any, expected: Any
) -> None:
    view = matrix_view(shape, left, right, **{"max_size": 100, "block_size": None, **keywords})
    assert view is not None
    assert view.view == expected
    x = jnp.asarray(np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    np.testing.assert_array_equal(view.array(view.matrices(x), x), x)


def test_the_last_two_axes_are_a_matrix_and_vectors_are_not_turned() -> None:
    params = {
        "matrix": jnp.ones((3, 2)),
        "stack": jnp.ones((5, 3, 2)),
        "vector": jnp.ones(3),
        "scalar": jnp.ones(()),
        "empty": jnp.ones((0, 3)),
        "row": jnp.ones((1, 1)),
        "none": None,
    }
    state = soap().init(params)
    shapes = [basis.left.shape for basis in state.bases]
    assert shapes == [(1, 1, 3, 3), (5, 1, 3, 3)]
    updates, new = jax.jit(soap().update)(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


def test_sides_above_max_size_stay_in_their_own_axes() -> None:
    ((left, right, *_),) = soap(max_size=4).init(jnp.ones((6, 4))).bases
    assert left is None
    assert right.shape == (1, 1, 4, 4)


@pytest.mark.parametrize("make", [lambda p: p, lambda p: lambda _: p], ids=["tree", "callable"])
def test_dimension_numbers_are_those_of_muon(make: Any) -> None:
    params = {
        "qkv": jnp.ones((2, 6, 3, 2, 4)),
        "embed": jnp.ones((9, 4)),
        "other": jnp.ones((4, 4)),
    }
    numbers = {
        "qkv": optax.contrib.MuonDimensionNumbers((1,), (3, 4)),
        "embed": MatrixAxes(0, 1, turn="right"),
        "other": None,
    }
    state = soap(dimension_numbers=make(numbers)).init(params)
    embed, qkv = state.bases
    assert embed.left is None
    assert embed.right.shape == (1, 1, 4, 4)
    assert qkv.left.shape == (6, 1, 6, 6)
    assert qkv.right.shape == (6, 1, 8, 8)


def on_one_device(*spec: str | None) -> NamedSharding:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*spec))


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"dimension_numbers": {"w": MatrixAxes(0, 2)}}, ValueError, r"\['w'\].*shape \(3, 2\)"),
        ({"dimension_numbers": {"w": MatrixAxes(1, 2)}}, ValueError, "from -2 to 1"),
        ({"dimension_numbers": {"w": MatrixAxes(0, 0)}}, ValueError, "at most once"),
        ({"dimension_numbers": {"w": MatrixAxes(0, 1, "up")}}, ValueError, "turn is 'up'"),
        ({"dimension_numbers": {"v": None}}, ValueError, "structure of the params"),
        ({"basis_interval": 0}, ValueError, "basis_interval is 0"),
        ({"decay": 1.0}, ValueError, "decay is 1.0"),
        ({"block_size": 1}, ValueError, "block_size is 1"),
        ({"stack_sharding": on_one_device(None)}, ValueError, "one axis to cut"),
        ({"stack_sharding": on_one_device("x", None)}, ValueError, "one axis to cut"),
        (
            {"stack_sharding": on_one_device(PartitionSpec.UNCONSTRAINED)},
            ValueError,
            "one axis to cut",
        ),
    ],
)
def test_what_does_not_fit_is_refused(keywords: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        soap(**keywords).init({"w": jnp.ones((3, 2))})


# Laws


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.usefixtures("optimizations")  # without them jax 0.10 rounds two programs differently
def test_with_nothing_turned_it_is_the_inner_optimizer_bit_for_bit(estimator: str) -> None:
    inner = sophia_optax.scale_by_sophia(
        0.8, 0.9, gamma=1.0, update_interval=2, nesterov=True, seed=3
    )
    params, state = train(sophia(max_size=0), 7, estimator=estimator)
    expected, inner_state = train(inner, 7, estimator=estimator)
    chex.assert_trees_all_equal(params, expected)
    chex.assert_trees_all_equal(state.inner, inner_state)


def orthogonal(key: jax.Array, size: int) -> jax.Array:
    return jnp.linalg.qr(jax.random.normal(key, (size, size)))[0]


def update_in_converged_basis(tx: Any, g: jax.Array, rounds: int) -> jax.Array:
    """The update for a gradient that is the same at each step, once the basis has converged."""
    state = tx.init(g)
    update = jax.jit(lambda s: tx.update(g, s, g))
    for _ in range(rounds):
        updates, state = update(state)
    return updates


def test_a_matrix_in_other_axes_takes_the_same_step_in_those_and_a_plain_clip_does_not() -> None:
    g = jax.random.normal(KEYS[4], (4, 4)) @ jnp.diag(jnp.array([8.0, 4.0, 2.0, 1.0]))
    u, v = orthogonal(KEYS[5], 4), orthogonal(KEYS[6], 4)
    clip = optax.clip(0.7)
    tx = in_eigenbasis(clip, basis_interval=1)
    # Whatever the axes, both bases converge to the singular vectors, in which g is diagonal.
    straight = update_in_converged_basis(tx, g, 60)
    turned = update_in_converged_basis(tx, u @ g @ v.T, 60)
    np.testing.assert_allclose(u @ straight @ v.T, turned, atol=1e-3)
    plain, other = clip.update(g, clip.init(g))[0], clip.update(u @ g @ v.T, clip.init(g))[0]
    assert np.abs(u @ plain @ v.T - other).max() > 0.5


@functools.cache
def trained(**keywords: Any) -> tuple[Tree, Any]:
    """Params and state after three refreshes of the bases, which any estimator would serve."""
    return train(sophia(**keywords), 7, estimator="gauss_newton_bartlett")


def coordinates_of(tx: Any, state: Any) -> Any:
    """The coordinates in which an update asks for an estimate."""
    seen = []

    def hessian_fn(key: jax.Array, /, *, coordinates: Any) -> Tree:
        seen.append(coordinates)
        return PARAMS

    tx.update(PARAMS, state, PARAMS, hessian_fn=hessian_fn, refresh=True, refresh_basis=False)
    (coordinates,) = seen
    return coordinates


@pytest.mark.parametrize("keywords", [{}, {"block_size": 2}, {"max_size": 5}])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimates_are_unbiased_for_the_diagonal_in_the_turned_coordinates(
    estimator: str, keywords: Any
) -> None:
    tx, (params, state) = sophia(**keywords), trained(**keywords)
    hessian_fn, flat = ESTIMATORS[estimator](params), oracles.flatten(params)

    def back_of(vector: jax.Array) -> jax.Array:
        tree = coordinates_of(tx, state).back(flat.rebuild(vector))
        return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])

    units = np.eye(flat.vector.size, dtype=np.float32)
    back = np.asarray(jax.jit(jax.vmap(back_of, out_axes=1))(units), np.float64)
    np.testing.assert_allclose(back.T @ back, units, atol=1e-5)
    if estimator == "hutchinson":
        dense = oracles.hessian(loss, params)
    else:
        dense = oracles.gauss_newton(logits, params, "categorical")
    exact = np.diag(back.T @ dense @ back)
    samples = oracles.many(
        lambda key: hessian_fn(key, coordinates=coordinates_of(tx, state)), seed=0, n=4000
    )
    oracles.assert_unbiased(samples, exact)
    plain = np.diag(dense)
    assert np.abs(exact - plain).max() > 0.1 * np.abs(plain).max()


def numpy_soap(grads: list[np.ndarray], interval: int) -> list[np.ndarray]:
    """SOAP in NumPy, for gradients that do not depend on the params (Vyas et al., Algorithm 3)."""
    b1, b2, beta, eps = 0.9, 0.95, 0.9, 1e-8
    m_rows, n_columns = grads[0].shape
    left, right = np.zeros((m_rows, m_rows)), np.zeros((n_columns, n_columns))
    q_left, q_right = np.eye(m_rows), np.eye(n_columns)
    m, v = np.zeros(grads[0].shape), np.zeros(grads[0].shape)
    updates = []
    for t, g in enumerate(grads):
        left = beta * left + (1 - beta) * g @ g.T
        right = beta * right + (1 - beta) * g.T @ g
        if t % interval == 0:
            q_left, q_right = np.linalg.qr(left @ q_left)[0], np.linalg.qr(right @ q_right)[0]
        m = b1 * m + (1 - b1) * g  # in its own axes
        turned = q_left.T @ g @ q_right
        v = b2 * v + (1 - b2) * turned**2
        ahead = b1 * (q_left.T @ m @ q_right) / (1 - b1 ** (t + 2)) + (1 - b1) * turned / (
            1 - b1 ** (t + 1)
        )
        z = ahead / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
        updates.append(q_left @ z @ q_right.T)
    return updates


def test_with_adam_inside_it_is_a_transcription_of_soap() -> None:
    rng = np.random.default_rng(0)
    grads = [rng.normal(size=(3, 3)) @ np.diag([3.0, 1.0, 0.3]) for _ in range(12)]
    with jax.enable_x64(True):
        tx = soap(basis_interval=3, decay=0.9)
        state, got = tx.init(jnp.zeros((3, 3))), []
        update = jax.jit(tx.update)
        for g in grads:
            updates, state = update(jnp.asarray(g), state)
            got.append(np.asarray(updates))
    np.testing.assert_allclose(got, numpy_soap(grads, 3), rtol=1e-7, atol=1e-9)


class Velocity(NamedTuple):
    velocity: Tree


def heavy_ball(state_of: Any = Velocity, tree_of: Any = lambda state: state.velocity) -> Any:
    """A momentum that an inner state calls as none of Optax's does."""

    def init(params: Tree) -> Any:
        return state_of(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Tree, state: Any, params: Tree = None) -> Any:
        del params
        new = jax.tree.map(lambda g, v: g + 0.9 * v, updates, tree_of(state))
        return new, state_of(new)

    return optax.GradientTransformation(init, update)


def linear(scale_by: Any) -> Any:
    """An adaptive optimizer whose floor hides its squares, so that only its momenta are left."""
    return optax.chain(scale_by(eps=1e8), optax.scale(1e8))


MOMENTA = {
    "trace": (optax.trace(0.9), None),
    "ema": (optax.ema(0.9), None),
    "adam": (linear(optax.scale_by_adam), None),
    "injected": (optax.inject_hyperparams(optax.trace)(0.9), None),
    "optimistic": (optax.scale_by_optimistic_gradient(), None),
    "apply_every": (optax.apply_every(3), None),
    "multi_steps": (optax.MultiSteps(optax.trace(0.9), 3).gradient_transformation(), None),
    "ademamix": (linear(optax.contrib.scale_by_ademamix), None),
    "adan": (linear(optax.scale_by_adan), ("m", "v", "g")),
    "dictionary": (heavy_ball(lambda tree: {"mu": tree}, lambda state: state["mu"]), None),
    "own": (heavy_ball(), ["velocity"]),
    "own dictionary": (heavy_ball(lambda tree: {"v": tree}, lambda state: state["v"]), ("v",)),
}


@pytest.mark.parametrize("name", MOMENTA)
def test_a_momentum_in_the_turned_axes_is_the_one_in_its_own(name: str) -> None:
    plain, momenta = MOMENTA[name]
    tx = in_eigenbasis(plain, basis_interval=2, momenta=momenta)
    chex.assert_trees_all_close(train(tx, 9)[0], train(plain, 9)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("inner", "where"),
    [
        (optax.scale_by_adan(), ".m['up'], and its name, 'm',"),
        (heavy_ball(), ".velocity['up'], and its name, 'velocity',"),
        (heavy_ball(lambda tree: tree, lambda state: state), "['up'], and its place"),
        (optax.chain(optax.scale(1.0), heavy_ball()), "[1].velocity['up'], and its name"),
    ],
    ids=["adan", "own", "bare tree", "chain"],
)
def test_a_state_that_does_not_say_what_its_momentum_is_is_refused(inner: Any, where: str) -> None:
    params = {"bias": PARAMS["bias"], "up": PARAMS["up"]}
    with pytest.raises(ValueError, match=re.escape(where)) as caught:
        in_eigenbasis(inner).init(params)
    assert "momenta=" in str(caught.value)
    state = in_eigenbasis(inner, momenta=()).init(params)
    with pytest.raises(ValueError, match=re.escape(where)):
        in_eigenbasis(inner).update(params, state, params)
    in_eigenbasis(inner).init({"bias": PARAMS["bias"]})  # where nothing is turned, nothing is asked


def test_names_that_are_no_momenta_are_refused() -> None:
    with pytest.raises(TypeError, match=r"momenta is 'mu'\. Pass the names"):
        in_eigenbasis(optax.scale_by_adam(), momenta="mu")
    with pytest.raises(
        ValueError, match=r"names 'velocty', which is no field .* it has 'velocity'"
    ):
        in_eigenbasis(heavy_ball(), momenta=("velocty",)).init(PARAMS["up"])


@pytest.mark.parametrize("inner", ["adam", "adamax", "yogi", "amsgrad", "lion", "belief", "rms"])
def test_states_of_optax_that_say_what_they_are_need_no_names(inner: str) -> None:
    in_eigenbasis(getattr(optax, f"scale_by_{inner}")()).init(PARAMS)


def test_a_hyperparameter_with_the_name_of_a_momentum_is_none() -> None:
    def heavy_ball_of(mu: Any) -> Any:
        return optax.trace(mu)

    inner = optax.inject_hyperparams(heavy_ball_of)(mu=0.9)
    tx, params = in_eigenbasis(inner, basis_interval=1), PARAMS["up"]
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates.shape == params.shape


def test_obj_fn_is_the_loss_of_the_params_in_their_own_axes() -> None:
    params = PARAMS["up"]

    def one_loss(up: jax.Array) -> jax.Array:
        return loss({**PARAMS, "up": up.astype(jnp.float32)})

    tx = in_eigenbasis(sophia_optax.sophia_h(1e-2, gamma=1.0), basis_interval=1)

    def first_step(**of: Any) -> Tree:
        return tx.update(params, tx.init(params), params, **of)

    got = jax.jit(lambda: first_step(obj_fn=one_loss))()
    expected = jax.jit(lambda: first_step(hessian_fn=sophia_optax.hutchinson(one_loss, params)))()
    chex.assert_trees_all_close(got, expected, rtol=1e-3, atol=1e-6)


def test_obj_fn_gets_params_of_their_own_dtype() -> None:
    seen = []

    def recorded(params: Tree) -> jax.Array:
        seen.append(jax.tree.map(jnp.result_type, params))
        return loss(params)

    params = {**PARAMS, "up": PARAMS["up"].astype(jnp.bfloat16)}
    tx = in_eigenbasis(sophia_optax.sophia_h(1e-2))
    jax.eval_shape(functools.partial(tx.update, obj_fn=recorded), params, tx.init(params), params)
    assert seen
    assert all(types == jax.tree.map(jnp.result_type, params) for types in seen)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_resumed_run_is_an_uninterrupted_one(estimator: str, tmp_path: Any) -> None:
    tx = sophia()
    saved = train(tx, 4, estimator=estimator)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", jax.eval_shape(lambda: saved))
    # Arrays on no device in particular, like those saved, for which the step is compiled.
    resumed = train(tx, 4, *jax.tree.map(np.asarray, restored), estimator=estimator)
    chex.assert_trees_all_equal(resumed, train(tx, 8, estimator=estimator))


# Refreshes


def test_the_basis_is_refreshed_every_so_many_steps_and_stays_between() -> None:
    tx = soap(basis_interval=3)
    (_, first), (_, third), (_, fourth) = (train(tx, steps) for steps in (1, 3, 4))
    chex.assert_trees_all_equal(first.bases[1].left_basis, third.bases[1].left_basis)
    assert np.any(third.bases[1].left_basis != fourth.bases[1].left_basis)
    assert np.any(first.bases[1].left != third.bases[1].left)


def test_two_compiled_steps_scheduled_from_the_host_are_the_one_with_a_branch() -> None:
    tx = soap(basis_interval=3)
    update = jax.jit(tx.update, static_argnames="refresh_basis")
    grads = gradients()
    state = other = tx.init(PARAMS)
    for count in range(5):
        updates, state = update(grads, state, PARAMS)
        others, other = update(grads, other, PARAMS, refresh_basis=count % 3 == 0)
        chex.assert_trees_all_close(updates, others, rtol=1e-5, atol=1e-6)


def test_what_is_no_sharding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TypeError, match=r"stack_sharding is P.*Pass a NamedSharding"):
        soap(stack_sharding=PartitionSpec("x"))


def test_a_traced_refresh_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    tx = soap()
    with pytest.raises(TypeError, match=r"refresh_basis is .*static_argnames"):
        jax.jit(lambda flag: tx.update(PARAMS, tx.init(PARAMS), refresh_basis=flag))(True)


def test_the_estimator_runs_on_its_own_refreshes_alone() -> None:
    tx, calls = sophia(), Calls(ESTIMATORS["hutchinson"](PARAMS))
    update = jax.jit(lambda s: tx.update(PARAMS, s, PARAMS, hessian_fn=calls)[1])
    state = tx.init(PARAMS)
    for _ in range(6):
        state = update(state)
    assert calls.so_far() == 3


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_estimator_may_be_compiled_by_itself(estimator: str) -> None:
    tx, hessian_fn = sophia(), ESTIMATORS[estimator](PARAMS)
    grads, state = gradients(), tx.init(PARAMS)
    expected = tx.update(grads, state, PARAMS, hessian_fn=hessian_fn)
    found = tx.update(grads, state, PARAMS, hessian_fn=jax.jit(hessian_fn))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_estimator_for_the_plain_axes_alone_is_refused_with_the_way_out() -> None:
    tx = sophia()
    with pytest.raises(TypeError, match=r"takes no `coordinates`.*HessianFn documents"):
        jax.eval_shape(
            functools.partial(tx.update, hessian_fn=lambda key: PARAMS),
            PARAMS,
            tx.init(PARAMS),
            PARAMS,
        )


def test_an_estimator_without_a_signature_is_called_with_the_coordinates() -> None:
    """As some functions written in C are."""
    tx = sophia()
    with pytest.raises(TypeError, match="'coordinates'"):  # Python's own error
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, hessian_fn=max)


def test_an_estimator_that_takes_any_keyword_is_called_with_the_coordinates() -> None:
    tx, seen = sophia(), []

    def estimate(key: jax.Array, /, **keywords: Any) -> Tree:
        seen.extend(keywords)
        return PARAMS

    jax.eval_shape(
        functools.partial(tx.update, hessian_fn=estimate), PARAMS, tx.init(PARAMS), PARAMS
    )
    assert set(seen) == {"coordinates"}


def test_several_probes_chunks_and_modes_work_in_turned_coordinates() -> None:
    tx = sophia()
    state = tx.init(PARAMS)
    grads = gradients()
    nus = []
    for keywords in (
        {"num_probes": 64, "probe_chunk": 8},
        {"num_probes": 64, "mode": "reverse_over_reverse"},
        {"num_probes": 64, "mode": "finite_difference"},
    ):
        hessian_fn = sophia_optax.hutchinson(loss, PARAMS, **keywords)
        update = functools.partial(
            tx.update, hessian_fn=hessian_fn, refresh=True, refresh_basis=True
        )
        nus.append(jax.jit(lambda s, update=update: update(grads, s, PARAMS)[1].inner.nu)(state))
    for other in nus[1:]:
        chex.assert_trees_all_close(nus[0], other, atol=2e-2)


# Wrappers


def test_it_works_under_masks_partitions_multi_steps_and_scan() -> None:
    plain = sophia_optax.sophia_h(1e-2, eigenbasis={"basis_interval": 2})
    labels = {"w": "sophia", "b": "sgd"}
    start = {"w": jnp.zeros((6, 4)), "b": jnp.zeros(4)}

    def loss(params: Tree) -> jax.Array:
        logits = X @ params["w"] + params["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    wrapped = [
        optax.partition({"sophia": plain, "sgd": optax.sgd(0.1)}, labels),
        optax.chain(optax.clip_by_global_norm(1.0), plain),
        optax.apply_if_finite(plain, 3),
        optax.inject_hyperparams(sophia_optax.sophia_h)(1e-2, eigenbasis={"basis_interval": 2}),
    ]
    for tx in map(optax.with_extra_args_support, wrapped):

        def step(carry: Any, _: Any, tx: Any = tx) -> Any:
            params, state = carry
            updates, state = tx.update(
                jax.grad(loss)(params),
                state,
                params,
                hessian_fn=sophia_optax.hutchinson(loss, params),
            )
            return (optax.apply_updates(params, updates), state), None

        run = jax.jit(lambda c, step=step: jax.lax.scan(step, c, None, length=30), donate_argnums=0)
        params, _ = run(jax.tree.map(jnp.copy, (start, tx.init(start))))[0]
        assert loss(params) < loss(start)


def test_a_masked_matrix_takes_the_steps_that_it_takes_alone() -> None:
    alone = sophia_optax.sophia_h(1e-2, eigenbasis=True)
    tx = optax.masked(alone, {"up": True, "bias": False, "down": False})
    grads = gradients()
    hessian_fn = ESTIMATORS["hutchinson"](PARAMS)
    updates, _ = jax.jit(functools.partial(tx.update, hessian_fn=hessian_fn))(
        grads, tx.init(PARAMS), PARAMS
    )
    whole, _ = jax.eval_shape(
        functools.partial(alone.update, hessian_fn=hessian_fn), grads, alone.init(PARAMS), PARAMS
    )
    np.testing.assert_array_equal(updates["bias"], grads["bias"])
    assert updates["up"].shape == whole["up"].shape
    assert np.all(np.abs(updates["up"]) < 0.1)


@pytest.mark.parametrize("wrapper", ["masked", "partition"])
def test_dimension_numbers_of_all_params_serve_where_some_are_masked(wrapper: str) -> None:
    numbers = {"up": MatrixAxes(turn="right"), "bias": None, "down": MatrixAxes(turn="left")}
    grads = gradients()

    def wrapped(dimension_numbers: Any) -> Any:
        tx = soap(dimension_numbers=dimension_numbers)
        if wrapper == "masked":
            return optax.masked(tx, {"up": True, "bias": True, "down": False})
        labels = {"up": "soap", "bias": "soap", "down": "sgd"}
        return optax.partition({"soap": tx, "sgd": optax.sgd(0.1)}, labels)

    tree, function = wrapped(numbers), wrapped(lambda params: {**numbers, "down": params["down"]})
    found, expected = (jax.jit(tx.update)(grads, tx.init(PARAMS)) for tx in (tree, function))
    chex.assert_trees_all_equal(found, expected)


def test_a_missing_gradient_leaves_its_basis_and_those_of_others_theirs() -> None:
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((3, 3))}
    grads = {"a": None, "b": jax.random.normal(KEYS[7], (3, 3))}
    tx = in_eigenbasis(optax.trace(0.9))
    state = tx.init(params)
    updates, new = jax.jit(functools.partial(tx.update, refresh_basis=True))(grads, state, params)
    assert updates["a"] is None
    chex.assert_trees_all_equal(new.bases[0], state.bases[0])
    np.testing.assert_allclose(new.bases[1].left[0, 0], 0.1 * grads["b"] @ grads["b"].T, rtol=1e-5)


def test_vmap_over_optimizers_is_each_of_them() -> None:
    tx = soap(basis_interval=2)
    grads = jax.random.normal(KEYS[7], (2, 4, 4))
    state = jax.vmap(tx.init)(grads)
    update = functools.partial(tx.update, refresh_basis=True)
    updates, _ = jax.jit(jax.vmap(update))(grads, state)
    alone, _ = jax.jit(update)(grads[1], tx.init(grads[1]))
    np.testing.assert_allclose(updates[1], alone, atol=1e-4)


@pytest.mark.parametrize("inner", ["adam", "sophia"])
def test_bfloat16_params_keep_their_dtypes_and_have_float32_bases(inner: str) -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    tx = soap() if inner == "adam" else sophia()
    extra = {} if inner == "adam" else {"hessian_fn": ESTIMATORS["hutchinson"](params)}
    state = tx.init(params)
    updates, new = jax.jit(lambda s: tx.update(params, s, params, **extra))(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    chex.assert_trees_all_equal_dtypes(updates, params)
    assert new.bases[0].left_basis.dtype == jnp.float32


@pytest.mark.parametrize("stack_sharding", [None, on_one_device("x")], ids=["each", "tiles"])
def test_matrices_of_one_shape_and_two_dtypes_keep_theirs(
    stack_sharding: NamedSharding | None,
) -> None:
    tx = in_eigenbasis(optax.trace(0.9), stack_sharding=stack_sharding)
    with jax.enable_x64(True):
        params = {"wide": jnp.ones((3, 3), jnp.float64), "w": jnp.ones((3, 3), jnp.float32)}
        state = tx.init(params)
        updates, new = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    chex.assert_trees_all_equal_dtypes(updates, params)


def test_a_wide_decay_widens_no_factor() -> None:
    params = jnp.ones((3, 3), jnp.float32)
    with jax.enable_x64(True):
        tx = in_eigenbasis(optax.trace(0.9), decay=jnp.asarray(0.9, jnp.float64))
        state = tx.init(params)
        _, new = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


@pytest.mark.parametrize(("gradient", "param"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_the_update_of_a_matrix_has_the_dtype_that_gradient_and_param_promote_to(
    gradient: str, param: str
) -> None:
    tx = soap()
    grads, params = jnp.ones((4, 3), gradient), jnp.ones((4, 3), param)
    state = tx.init(params)
    assert jax.eval_shape(tx.update, grads, state, params)[0].dtype == jnp.float32
    assert jax.eval_shape(tx.update, grads, state)[0].dtype == gradient


def five_steps(params: Tree, grads: Tree) -> Tree:
    """The params after a step with each of the gradients, which are stacked."""
    tx = in_eigenbasis(
        sophia_optax.scale_by_sophia(0.8, 0.9, gamma=1.0, update_interval=2, nesterov=True),
        basis_interval=2,
    )

    def estimate(key: jax.Array, /, *, coordinates: Any) -> Tree:
        first = jax.tree.map(lambda g: g[0], grads)
        return jax.tree.map(lambda g: 1 + jnp.square(g), coordinates.turn(first))

    def step(carry: Any, g: Tree) -> Any:
        params, state = carry
        updates, state = tx.update(g, state, params, hessian_fn=estimate)
        return (jax.tree.map(lambda p, u: p - 0.1 * u, params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), grads)[0][0]


@functools.cache
def five_steps_on_one_device() -> tuple[Tree, Tree, Tree]:
    """Params, five gradients of each, and the params after these."""
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(16, 8)), "b": np.ones(8)}
    # Singular values that are apart and a curvature of at least one, so that rounding stays small:
    # the basis of two that are equal, and the sign of a clipped step, are matters of rounding.
    left, right = (np.linalg.qr(rng.normal(size=shape))[0] for shape in ((16, 8), (8, 8)))
    w = left * np.linspace(1.0, 4.0, 8) @ right.T
    scales = np.array([1.0, -0.5, 2.0, 1.5, -1.0])
    grads = {
        "w": scales[:, None, None] * (w + 0.3 * rng.normal(size=(5, 16, 8))),
        "b": scales[:, None] * params["b"],
    }
    params, grads = jax.tree.map(np.float32, (params, grads))
    return params, grads, jax.jit(five_steps)(params, grads)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [(), ("data",), (None, "data")], ids=["data", "fsdp", "tensor"])
def test_eight_devices_give_the_numbers_of_one(axis_type: AxisType, spec: Any) -> None:
    params, grads, expected = five_steps_on_one_device()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))

    def place(tree: Tree, *spec: Any) -> Tree:
        specs = {"w": PartitionSpec(*spec), "b": PartitionSpec()}
        return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)

    with jax.set_mesh(mesh):
        params = place(params, *spec)
        found = jax.jit(five_steps)(params, place(grads, None, *spec))
    if axis_type == AxisType.Explicit:
        assert found["w"].sharding.is_equivalent_to(params["w"].sharding, ndim=2)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)


STACKS = {
    "a stack": ((8, 4, 6), ((1,), (2,)), "both"),
    "one that does not divide": ((3, 4, 6), ((1,), (2,)), "both"),
    "two axes that divide together": ((2, 4, 6, 4), ((2,), (3,)), "both"),
    "a stack in the middle": ((4, 3, 6), ((0,), (2,)), "both"),
    "one side": ((19, 4), ((0,), (1,)), "right"),
    "the other side": ((4, 19), ((0,), (1,)), "left"),
    "one side of two axes": ((3, 5, 4), ((0, 1), (2,)), "right"),
    "blocks": ((8, 4), ((0,), (1,)), "both"),
    "blocks of the columns": ((4, 6), ((0,), (1,)), "both"),
    "blocks of two axes": ((2, 4, 4), ((0, 1), (2,)), "both"),
    "nothing to cut": ((2, 2), ((0,), (1,)), "both"),
}


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_sharding_changes_no_number(name: str) -> None:
    shape, (left, right), turn = STACKS[name]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    g = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)

    def moved(stack_sharding: NamedSharding | None) -> Any:
        tx = in_eigenbasis(
            optax.trace(0.9),
            basis_interval=1,
            block_size=2,
            dimension_numbers=lambda _: MatrixAxes(left, right, turn),
            stack_sharding=stack_sharding,
        )

        @jax.jit
        def steps(g: jax.Array) -> Any:
            step = lambda state, g: tx.update(g, state)[::-1]  # noqa: E731
            return jax.lax.scan(step, tx.init(g[0]), g)

        return steps(g)

    expected = moved(None)
    spread = moved(NamedSharding(mesh, PartitionSpec("data")))
    chex.assert_trees_all_close(spread, expected, rtol=1e-4, atol=1e-5)


def test_matrices_that_are_cut_in_different_ways_take_the_steps_that_they_take_alone() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    names = ("nothing to cut", "one side", "the other side", "blocks")
    rng = np.random.default_rng(0)
    grads = {name: np.float32(rng.normal(size=STACKS[name][0])) for name in names}

    def updates(grads: Tree, stack_sharding: NamedSharding | None) -> Tree:
        numbers = {name: MatrixAxes(0, 1, STACKS[name][2]) for name in grads}
        tx = in_eigenbasis(
            optax.trace(0.9),
            block_size=2,
            dimension_numbers=numbers,
            stack_sharding=stack_sharding,
        )
        return tx.update(grads, tx.init(grads))

    whole, cut = (
        functools.partial(updates, stack_sharding=sharding)
        for sharding in (None, NamedSharding(mesh, PartitionSpec("data")))
    )
    chex.assert_trees_all_close(jax.jit(cut)(grads), jax.jit(whole)(grads), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "turns", "padded"),
    [
        ((20, 8), (True, True), (32, 8)),
        ((8, 20), (True, True), (8, 32)),
        ((20, 8), (False, True), (24, 8)),
        ((8, 20), (True, False), (8, 24)),
    ],
)
def test_a_single_matrix_is_padded_until_each_device_has_whole_blocks(
    shape: Any, turns: Any, padded: Any
) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    stacks = NamedSharding(mesh, PartitionSpec("data"))
    view = matrix_view(
        shape, (0,), (1,), turns=turns, max_size=20, block_size=4, stack_sharding=stacks
    )
    assert view is not None
    assert jax.eval_shape(view.spread_array, jnp.ones(shape)).shape == padded


@pytest.mark.parametrize("estimator", ["hutchinson", "gauss_newton_bartlett"])
def test_a_stack_sharding_changes_no_estimate(estimator: str) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = {"w": 0.3 * jax.random.normal(KEYS[2], (3, 6, 6))}

    def outputs(params: Tree) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), X, params["w"])[0]

    def step(coordinates_are_spread: bool) -> Tree:
        stacks = NamedSharding(mesh, PartitionSpec("data")) if coordinates_are_spread else None
        tx = in_eigenbasis(
            sophia_optax.scale_by_sophia(0.9, 0.9, gamma=1.0, update_interval=1),
            block_size=3,
            stack_sharding=stacks,
        )

        def loss_fn(params: Tree) -> jax.Array:
            return optax.losses.softmax_cross_entropy_with_integer_labels(
                outputs(params), LABELS
            ).mean()

        if estimator == "hutchinson":
            hessian_fn = sophia_optax.hutchinson(loss_fn, params, num_probes=2)
        else:
            hessian_fn = sophia_optax.gauss_newton_bartlett(outputs, params)
        state = tx.init(params)
        return tx.update(jax.grad(loss_fn)(params), state, params, hessian_fn=hessian_fn)[1].inner

    expected = jax.jit(step, static_argnums=0)(False)
    chex.assert_trees_all_close(
        jax.jit(step, static_argnums=0)(True), expected, rtol=1e-3, atol=1e-5
    )


def test_a_stack_is_cut_along_all_mesh_axes_of_its_sharding() -> None:
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    tx = in_eigenbasis(
        optax.trace(0.9), stack_sharding=NamedSharding(mesh, PartitionSpec(("a", "b")))
    )
    g = jnp.ones((5, 4, 4))
    state = tx.init(g)
    found = jax.eval_shape(tx.update, g, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, (g, state))


@pytest.mark.parametrize("shape", [(32, 8), (8, 32)], ids=["rows", "columns"])
def test_a_single_matrix_is_cut_along_its_blocks_and_not_gathered(shape: tuple[int, int]) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    stacks = NamedSharding(mesh, PartitionSpec("data"))
    columns, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((None, "data"), ()))
    tx = in_eigenbasis(optax.trace(0.9), basis_interval=1, block_size=4, stack_sharding=stacks)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(tx.init, x)
    shardings = jax.tree.map(lambda leaf: columns if leaf.ndim == 2 else whole, state)
    step = jax.jit(tx.update, in_shardings=(columns, shardings), out_shardings=(columns, shardings))
    compiled = step.lower(x, state).compile()
    assert hlo.collectives(compiled)
    # The state is on all devices: they give each other the bases of eight blocks, of 16 numbers.
    assert not hlo.collectives(compiled, more_than=8 * 16)


@pytest.mark.parametrize(
    ("shape", "turns", "block_size", "axis"),
    [
        ((3, 4, 6), (True, False), None, 0),
        ((1, 4, 6), (False, True), 2, 2),
        ((1, 4, 6), (True, False), 2, 4),
        ((1, 6, 4), (True, True), 2, 1),
        ((1, 4, 6), (True, True), 2, 3),
        ((1, 4, 6), (True, True), None, None),
    ],
)
def test_the_stack_is_cut_or_else_a_side_that_is_not_turned_or_else_the_blocks(
    shape: Any, turns: Any, block_size: int | None, axis: int | None
) -> None:
    view = matrix_view(shape, (1,), (2,), turns=turns, max_size=8, block_size=block_size)
    assert view is not None
    assert view.spread_axis == axis


@pytest.mark.parametrize("turn", ["left", "right"])
def test_a_side_that_is_not_turned_is_cut_and_not_gathered(turn: Any) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shape, spec = ((4, 40), (None, "data")) if turn == "left" else ((40, 4), ("data",))
    sharding, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (spec, ()))
    tx = in_eigenbasis(
        optax.trace(0.9),
        basis_interval=1,
        dimension_numbers=lambda _: MatrixAxes(0, 1, turn),
        stack_sharding=NamedSharding(mesh, PartitionSpec("data")),
    )
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(tx.init, x)
    shardings = jax.tree.map(lambda leaf: sharding if leaf.ndim == 2 else whole, state)
    step = jax.jit(tx.update, in_shardings=(sharding, shardings))
    compiled = step.lower(x, state).compile()
    assert hlo.collectives(compiled)
    # The product of the gradient with itself is summed over the devices.
    assert not hlo.collectives(compiled, more_than=4 * 4)


def test_a_stack_sharding_works_without_jit_and_under_vmap() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    grads = jax.random.normal(KEYS[2], (2, 3, 6, 4))

    def step(g: jax.Array, stack_sharding: NamedSharding | None) -> Any:
        tx = in_eigenbasis(optax.trace(0.9), block_size=2, stack_sharding=stack_sharding)
        return tx.update(g, tx.init(g))

    whole = jax.jit(functools.partial(step, stack_sharding=None))
    expected = [whole(g) for g in grads]
    spread = functools.partial(step, stack_sharding=NamedSharding(mesh, PartitionSpec("data")))
    chex.assert_trees_all_close([spread(g) for g in grads], expected, rtol=1e-4, atol=1e-5)
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected)
    chex.assert_trees_all_close(jax.jit(jax.vmap(spread))(grads), together, rtol=1e-4, atol=1e-5)


def test_a_stack_sharding_over_manual_axes_is_refused() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = in_eigenbasis(optax.trace(0.9), stack_sharding=NamedSharding(mesh, PartitionSpec("data")))
    spec = PartitionSpec("data")
    step = jax.shard_map(lambda g: tx.update(g, tx.init(g))[0], in_specs=spec, out_specs=spec)
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match=r"\('data',\).*Leave stack_sharding out"),
    ):
        jax.eval_shape(step, jnp.ones((8, 6, 4)))


@pytest.mark.parametrize(
    ("size", "block_size", "block"),
    [(12, 4, 4), (7, 4, 7), (7, 2, 7), (6, 4, 3), (10, 9, 5), (22, 8, 2), (22, 9, 22)],
)
def test_a_block_is_a_divisor_that_is_not_too_small(size: int, block_size: int, block: int) -> None:
    view = matrix_view((size, 2), (0,), (1,), max_size=64, block_size=block_size)
    assert view is not None
    assert view.view[1:3] == (size // block, block)


def test_more_parameters_are_no_more_products_for_a_tpu() -> None:
    tx = in_eigenbasis(
        optax.trace(0.9), basis_interval=1, block_size=2, stack_sharding=on_one_device("x")
    )

    def products(params: Tree) -> tuple[int, int]:
        lowered = (
            jax.jit(tx.update).trace(params, tx.init(params)).lower(lowering_platforms=("tpu",))
        )
        program = lowered.as_text()
        return program.count("dot_general"), program.count("custom_call @Qr")

    one = products([jnp.ones((2, 4, 6))])
    assert min(one) > 0
    assert products([jnp.ones((2, 4, 6)), jnp.ones((8, 4)), jnp.ones((3, 2, 2))]) == one


@pytest.mark.parametrize("axis", [0, 1])
def test_long_sides_of_different_lengths_are_no_more_products_for_a_tpu(axis: int) -> None:
    tx = in_eigenbasis(optax.trace(0.9), max_size=4, stack_sharding=on_one_device("x"))

    def products(*lengths: int) -> int:
        params = [jnp.ones((n, 4) if axis == 0 else (4, n)) for n in lengths]
        traced = jax.jit(tx.update).trace(params, tx.init(params))
        return traced.lower(lowering_platforms=("tpu",)).as_text().count("dot_general")

    assert products(19, 23) == products(19)


@pytest.mark.parametrize("stack_sharding", [None, on_one_device("x")], ids=["each", "tiles"])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_all_products_have_float32_operands_and_the_highest_precision(
    platform: str, stack_sharding: NamedSharding | None
) -> None:
    """Which changes no number on a CPU."""
    tx = in_eigenbasis(optax.trace(0.9), block_size=2, stack_sharding=stack_sharding)
    params = {"w": jnp.ones((4, 6)), "narrow": jnp.ones((6, 4), jnp.bfloat16)}
    traced = jax.jit(tx.update).trace(params, tx.init(params), params)
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
    assert not any("bf16" in line for line in products)


@pytest.mark.parametrize("turns", [(True, True), (True, False), (False, True)])
def test_a_loop_over_tiles_is_all_of_them_at_once(
    turns: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tiles of one size in matrices of several, one that no block divides, and a long side. Bases
    # of 3 x 3: those of 2 x 2 are symmetric.
    shapes = [(4, 3, 6), (2, 6, 3), (3, 9, 6), (1, 5, 6), (1, 18, 3)]
    xs = [np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32) for shape in shapes]
    views = [
        matrix_view(
            shape,
            (1,),
            (2,),
            turns=turns,
            max_size=18,
            block_size=3,
            stack_sharding=on_one_device("x"),
        )
        for shape in shapes
    ]

    def everything(xs: list[jax.Array]) -> Any:
        leaves = TurnedLeaves.of(xs, views)
        bases, _ = leaves.observe(
            tuple(map(MatrixView.init, leaves.views, xs)), leaves.matrices(xs), 0.5
        )
        bases = refresh(leaves.views, bases)
        coordinates = EigenbasisCoordinates(leaves, bases)
        return bases, coordinates.turn(xs), coordinates.back(xs)

    def on_a_tpu(*operands: Any, tpu: Any = None, default: Any, **_: Any) -> Any:
        loops.append(tpu)
        return (tpu or default)(*operands)

    loops: list[Any] = []
    at_once = jax.jit(jax.vmap(everything))(xs)
    monkeypatch.setattr(jax.lax, "platform_dependent", on_a_tpu)
    step = jax.jit(everything)
    one_by_one = [step([x[i] for x in xs]) for i in range(2)]
    assert any(loops)
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one)
    chex.assert_trees_all_close(together, at_once, atol=1e-5)
    chex.assert_trees_all_close(jax.jit(jax.vmap(everything))(xs), at_once, atol=1e-5)


# Neither of low rank nor divided by their own size: both would enlarge rounding a thousandfold.
SQUARE = jax.random.normal(KEYS[0], (8, 4, 4))


@pytest.mark.parametrize(
    "params_spec, gradient_spec",
    [(("a", "b"), ("b", "a")), ((("a", "b"),), (("b", "a"),)), ((), ("a",)), (("a",), ())],
)
def test_a_gradient_laid_out_otherwise_than_its_explicit_params_gives_the_same_numbers(
    params_spec: Any, gradient_spec: Any
) -> None:
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    gradient, tx = SQUARE, in_eigenbasis(optax.clip(0.3), basis_interval=1)
    updates, state = jax.jit(tx.update)(gradient, tx.init(gradient))
    with jax.set_mesh(mesh):
        params = jax.device_put(gradient, NamedSharding(mesh, PartitionSpec(*params_spec)))
        laid_out = jax.device_put(gradient, NamedSharding(mesh, PartitionSpec(*gradient_spec)))
        found, found_state = jax.jit(tx.update)(laid_out, jax.jit(tx.init)(params), params)
    chex.assert_trees_all_close(found, updates, atol=1e-5)
    chex.assert_trees_all_close(found_state, state, atol=1e-5)


def test_a_mesh_of_explicit_and_auto_axes_gives_the_same_numbers() -> None:
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit, AxisType.Auto))
    gradient, tx = SQUARE, in_eigenbasis(optax.clip(0.3), basis_interval=1)
    expected = jax.jit(tx.update)(gradient, tx.init(gradient))
    with jax.set_mesh(mesh):
        laid_out = jax.device_put(gradient, NamedSharding(mesh, PartitionSpec("a")))
        found = jax.jit(tx.update)(laid_out, jax.jit(tx.init)(laid_out))
    chex.assert_trees_all_close(found, expected, atol=1e-5)


def test_params_as_shards_in_a_shard_map_give_the_numbers_of_jit() -> None:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    gradient = {"w": SQUARE, "b": jnp.ones(8)}
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.inf), gradient)
    tx = in_eigenbasis(optax.clip(0.3), basis_interval=1)

    def two_steps(first: Tree, second: Tree, state: Any) -> Any:
        _, state = tx.update(first, state)
        return tx.update(second, state)

    state = tx.init(gradient)
    specs = jax.tree.map(lambda x: PartitionSpec("d") if x.ndim else PartitionSpec(), state)
    spec = PartitionSpec("d")
    on_shards = jax.jit(
        jax.shard_map(two_steps, mesh=mesh, in_specs=(spec, spec, specs), out_specs=(spec, specs))
    )
    found = on_shards(gradient, gradient, state)
    chex.assert_trees_all_close(found, jax.jit(two_steps)(gradient, gradient, state), atol=1e-5)
    assert on_shards(gradient, bad, state)[1].rejected == 1


def test_explicit_axes_beside_a_manual_one_give_the_numbers_of_jit() -> None:
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    tx = in_eigenbasis(optax.clip(0.3), basis_interval=1)
    expected, _ = jax.jit(tx.update)(SQUARE, tx.init(SQUARE))
    with jax.set_mesh(mesh):
        g = jax.device_put(SQUARE, NamedSharding(mesh, PartitionSpec(("a", "b"))))
        step = jax.shard_map(
            lambda g: tx.update(g, tx.init(g))[0],
            axis_names={"a"},
            in_specs=PartitionSpec("a"),
            out_specs=PartitionSpec("a"),
        )
        np.testing.assert_allclose(jax.jit(step)(g), expected, atol=1e-5)


def test_a_stack_sharding_beside_a_manual_axis_gives_the_numbers_of_jit() -> None:
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    stacks = NamedSharding(mesh, PartitionSpec("b"))
    whole, cut = (
        in_eigenbasis(optax.clip(0.3), basis_interval=1, stack_sharding=stack_sharding)
        for stack_sharding in (None, stacks)
    )
    expected, _ = jax.jit(whole.update)(SQUARE, whole.init(SQUARE))
    step = jax.shard_map(
        lambda g: cut.update(g, cut.init(g))[0],
        mesh=mesh,
        axis_names={"a"},
        in_specs=PartitionSpec("a"),
        out_specs=PartitionSpec("a"),
    )
    np.testing.assert_allclose(jax.jit(step)(SQUARE), expected, atol=1e-5)


def test_a_scan_within_a_shard_map_may_begin_there() -> None:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    tx = in_eigenbasis(optax.clip(0.3), basis_interval=1)

    def last(g: jax.Array) -> jax.Array:
        step = lambda state, _: tx.update(g, state)[::-1]  # noqa: E731
        return jax.lax.scan(step, tx.init(g), length=2)[1][-1]

    spec = PartitionSpec("d")
    begun = jax.shard_map(last, mesh=mesh, in_specs=spec, out_specs=spec)
    assert jax.eval_shape(begun, SQUARE).shape == SQUARE.shape


@pytest.mark.parametrize("below", [PARAMS["up"], jnp.ones(3)], ids=["matrix", "vector"])
def test_a_parameter_below_a_key_named_as_a_momentum_is_not_taken_for_one(below: Any) -> None:
    def after_four(name: str) -> Any:
        gradient = {name: {"w": below}, "w": PARAMS["up"][::-1]}
        tx = soap(basis_interval=1)
        state = tx.init(gradient)
        for _ in range(4):
            updates, state = jax.jit(tx.update)(gradient, state)
        return updates, state.inner.nu

    chex.assert_trees_all_equal(
        jax.tree.leaves(after_four("mu")), jax.tree.leaves(after_four("mean"))
    )


def test_complex_matrices_stay_in_their_own_axes() -> None:
    gradient = jax.random.normal(KEYS[0], (4, 3)) + 1j * jax.random.normal(KEYS[1], (4, 3))
    tx = in_eigenbasis(optax.trace(0.0), basis_interval=1)
    state = tx.init(gradient)
    for _ in range(3):
        updates, state = tx.update(gradient, state)
    chex.assert_trees_all_equal(updates, gradient)


def test_integer_matrices_are_not_turned() -> None:
    tx, params = in_eigenbasis(optax.identity()), {"table": jnp.ones((4, 3), jnp.int32)}
    state = tx.init(params)
    assert jnp.shape(state.bases) == ()
    updates, new = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes((updates, new), (params, state))


def test_a_gradient_of_the_second_matrix_that_is_not_finite_is_counted() -> None:
    tx = soap()
    gradient = {**PARAMS, "up": PARAMS["up"].at[0, 0].set(jnp.nan)}
    assert list(PARAMS) != sorted(PARAMS)  # "down" comes first
    updates, state = jax.jit(tx.update)(gradient, tx.init(PARAMS))
    assert state.rejected == 1
    assert finite((updates, state))
    assert np.all(updates["up"] == 0)
    assert np.any(updates["down"] != 0)


def test_a_gradient_whose_squares_overflow_in_the_sum_of_all_blocks_is_rejected() -> None:
    # Those of each of the two blocks of rows sum to 2e38, those of the block of columns to 4e38.
    tx, g = soap(block_size=2), jnp.full((4, 2), np.sqrt(0.5e38))
    updates, state = jax.jit(tx.update)(g, tx.init(g))
    assert state.rejected == 1
    assert finite((updates, state))


def test_a_power_step_keeps_the_axes_in_which_the_factor_is_zero() -> None:
    q = jnp.linalg.qr(jax.random.normal(KEYS[5], (8, 8)))[0]
    new = _eigenbasis.power_step(jnp.outer(q[:, 0], q[:, 0]), q)
    np.testing.assert_allclose(jnp.abs(q.T @ new), jnp.eye(8), atol=1e-2)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_power_step_does_not_depend_on_the_size_of_the_factor(scale: float) -> None:
    x, basis = jax.random.normal(KEYS[4], (4, 4)), orthogonal(KEYS[5], 4)
    step = jax.jit(_eigenbasis.power_step)
    np.testing.assert_allclose(step(scale * x @ x.T, basis), step(x @ x.T, basis), atol=1e-5)


def test_a_block_whose_new_basis_is_not_finite_keeps_its_own_and_others_take_theirs() -> None:
    basis = jnp.stack([orthogonal(KEYS[5], 3), orthogonal(KEYS[6], 3)])
    factor = jnp.stack([jnp.diag(jnp.arange(1.0, 4.0))] * 2)
    step = jax.jit(_eigenbasis.power_step)
    expected, found = step(factor, basis), step(factor.at[0, 0, 1].set(jnp.inf), basis)
    np.testing.assert_array_equal(found[0], basis[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_rounding_is_found_without_gathering_the_momentum(axis_type: AxisType) -> None:
    view = matrix_view((16, 8), (0,), (1,), max_size=16, block_size=None)
    assert view is not None
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        momentum = jax.device_put(jnp.ones((16, 8)), rows)
        compiled = jax.jit(view.above_rounding, out_shardings=rows).lower(momentum).compile()
    assert hlo.collectives(compiled)
    assert not hlo.collectives(compiled, more_than=1)


# Bad gradients


def finite(tree: Tree) -> bool:
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


@functools.cache
def update_of_a_matrix() -> Any:
    """A compiled update of Sophia in an eigenbasis that turns at each step."""
    tx = sophia(basis_interval=1)
    ones = lambda key, coordinates: jnp.ones((6, 4))  # noqa: E731
    return tx.init(jnp.zeros((6, 4))), jax.jit(lambda g, s: tx.update(g, s, hessian_fn=ones))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("rank_one", [False, True])
def test_the_state_is_finite_and_the_bases_orthogonal_whatever_the_gradients(
    scale: float, rank_one: bool
) -> None:
    state, update = update_of_a_matrix()
    g = jnp.outer(jnp.arange(1.0, 7.0), jnp.arange(1.0, 5.0)) if rank_one else X[:6, :4]
    for _ in range(5):
        updates, state = update(scale * g, state)
    assert finite((updates, state))
    (basis,) = state.bases
    for q in (basis.left_basis, basis.right_basis):
        np.testing.assert_allclose(q[0, 0].T @ q[0, 0], np.eye(q.shape[-1]), atol=1e-5)


def test_no_step_is_long_where_the_gradient_has_no_part() -> None:
    """With fewer examples than rows. Adam divides what is left there by its own size."""
    rng = np.random.default_rng(0)
    g = jnp.asarray(rng.normal(size=(256, 64)) @ rng.normal(size=(64, 64)), jnp.float32)
    tx = soap(basis_interval=10)
    state = tx.init(g)
    update = jax.jit(lambda s: tx.update(g, s))
    for _ in range(20):
        updates, state = update(state)
    # A step of at most about one in each of the 64 x 64 coordinates in which there is a gradient.
    assert np.linalg.norm(updates) < 64


@pytest.mark.parametrize("rank", [1, 8])
def test_no_step_leaves_the_space_of_gradients_of_low_rank(rank: int) -> None:
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(64, rank)), rng.normal(size=(rank, 64))
    g = jnp.asarray(1e-3 * left @ right, jnp.float32)
    tx = sophia(basis_interval=10)
    state = tx.init(g)
    square = lambda key, coordinates: jnp.square(coordinates.turn(g))  # noqa: E731
    update = jax.jit(lambda s: tx.update(g, s, hessian_fn=square))
    for _ in range(20):
        updates, state = update(state)
    project_left, project_right = (
        q @ q.T for q in (np.linalg.qr(left)[0], np.linalg.qr(right.T)[0])
    )
    inside = project_left @ np.asarray(updates) @ project_right
    np.testing.assert_allclose(np.linalg.norm(inside), rank, rtol=1e-3)
    assert np.linalg.norm(updates - inside) < 1e-4


def test_a_momentum_whose_squares_overflow_is_not_taken_for_rounding() -> None:
    tx, g = in_eigenbasis(optax.trace(0.9)), jnp.diag(jnp.array([1e19, 1e18]))
    step = jax.jit(functools.partial(tx.update, g, refresh_basis=False))
    _, state = step(tx.init(g))
    updates, state = step(state)
    assert state.rejected == 0
    np.testing.assert_allclose(updates, 1.9 * g, rtol=1e-5)


@pytest.mark.parametrize("mu_dtype", [None, "bfloat16"])
def test_coordinates_and_matrices_of_a_stack_that_are_small_are_not_taken_for_rounding(
    mu_dtype: str | None,
) -> None:
    g = jnp.array([[1.0, 1e-5], [1e-5, -1.0]])
    stack = jnp.stack([g, 1e-10 * g])
    tx = in_eigenbasis(optax.scale_by_adam(eps=0.0, mu_dtype=mu_dtype))
    step = jax.jit(functools.partial(tx.update, refresh_basis=False))
    np.testing.assert_allclose(step(stack, tx.init(stack))[0], jnp.sign(stack), rtol=1e-2)


def test_a_momentum_takes_its_step_where_the_current_gradient_has_no_part() -> None:
    tx = in_eigenbasis(optax.trace(0.5))
    first, second = jnp.diag(jnp.array([1.0, 0.0])), jnp.diag(jnp.array([0.0, 1.0]))
    step = jax.jit(functools.partial(tx.update, refresh_basis=False))
    updates, _ = step(second, step(first, tx.init(first))[1])
    np.testing.assert_array_equal(updates, 0.5 * first + second)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_weight_decay_inside_is_one_of_the_params(scale: float) -> None:
    inner = optax.chain(optax.trace(0.5), optax.add_decayed_weights(0.1))
    tx, g = in_eigenbasis(inner), scale * X[:6, :4]
    updates, _ = jax.jit(tx.update)(g, tx.init(X[6:12, :4]), X[6:12, :4])
    np.testing.assert_allclose(updates, g + 0.1 * X[6:12, :4], atol=1e-5)


def test_a_step_is_taken_along_coordinates_where_any_of_two_momenta_is_no_rounding() -> None:
    g = jax.random.normal(KEYS[7], (4, 4))
    upper = jnp.triu(jnp.ones((4, 4)))

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        return updates, {"mu": upper * updates, "trace": (1 - upper) * updates}

    inner = optax.GradientTransformation(lambda p: {"mu": 0 * p, "trace": 0 * p}, update)
    tx = in_eigenbasis(inner)
    step = jax.jit(functools.partial(tx.update, refresh_basis=False))
    np.testing.assert_array_equal(step(g, tx.init(g))[0], g)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_counts_as_zero_and_is_counted(bad: float) -> None:
    state, step = update_of_a_matrix()
    _, state = step(X[:6, :4], state)
    updates, after = step(X[:6, :4].at[2, 3].set(bad), state)
    _, zeros = step(jnp.zeros((6, 4)), state)
    assert after.rejected == 1
    assert finite((updates, after))
    chex.assert_trees_all_close(after.inner.mu, zeros.inner.mu, atol=1e-6)
    chex.assert_trees_all_equal(after.bases[0].left, state.bases[0].left)


def test_a_nan_estimate_is_dropped_and_counted_by_sophia() -> None:
    tx = sophia()
    estimate = lambda key, coordinates: jnp.full((6, 4), jnp.nan)  # noqa: E731
    _, state = jax.jit(functools.partial(tx.update, hessian_fn=estimate))(
        X[:6, :4], tx.init(X[:6, :4])
    )
    assert state.inner.rejected == 1
    assert finite(state)


def test_a_leaf_that_goes_quiet_for_a_thousand_steps_comes_back() -> None:
    tx = soap(basis_interval=1)
    g = X[:6, :4]

    def step(state: Any, scale: jax.Array) -> Any:
        updates, state = tx.update(scale * g, state)
        return state, updates

    scales = jnp.where((jnp.arange(1200) < 50) | (jnp.arange(1200) >= 1050), 1.0, 0.0)
    state, updates = jax.jit(lambda s: jax.lax.scan(step, s, scales))(tx.init(g))
    assert finite((state, updates))
    np.testing.assert_allclose(np.abs(updates[-1]).max(), np.abs(updates[49]).max(), rtol=0.2)


@pytest.mark.parametrize("block_size", (None, 2))
@pytest.mark.parametrize("shape", ((1, 1, 5), (1, 4, 3), (2, 5, 2), (3, 4, 4)))
def test_turning_back_undoes_turning(shape: tuple[int, int, int], block_size: int | None) -> None:
    view = matrix_view(shape, (1,), (2,), max_size=9, block_size=block_size)
    assert view is not None
    x = np.float32(np.random.default_rng(0).normal(size=shape))

    @jax.jit
    def there_and_back(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        leaves = TurnedLeaves.of([x], [view])
        bases, (known,) = leaves.observe((view.init(x),), leaves.matrices([x]), 0.5)
        bases = refresh(leaves.views, refresh(leaves.views, bases))
        coordinates = EigenbasisCoordinates(leaves, bases)
        return coordinates.back(coordinates.turn([x]))[0], known

    back, known = there_and_back(x)
    assert known
    np.testing.assert_allclose(back, x, atol=1e-5)


@pytest.mark.parametrize("size", [1, 16, 150])
@pytest.mark.parametrize("values", ["equal", "12 decades", "rank 1", "zero"])
def test_cholesky_qr_is_qr_to_rounding_on_what_a_refresh_gives_it(values, size):
    rng = np.random.default_rng(size)
    axes, basis = (np.linalg.qr(rng.normal(size=(2, size, size)))[0] for _ in range(2))
    number = np.arange(size)
    spectrum = {
        "equal": np.ones(size),
        "12 decades": 10.0 ** (-12 * number / size),
        "rank 1": np.where(number == 0, 1.0, 0.0),
        "zero": np.zeros(size),
    }[values]
    factor = axes * spectrum @ np.swapaxes(axes, -1, -2) / max(spectrum.sum(), 1.0)
    moved = np.float32(factor @ basis + 128 * np.finfo(np.float32).eps * basis)
    found = np.asarray(shifted_cholesky_qr(jnp.asarray(moved)))
    transposed = np.swapaxes(found, -1, -2)
    np.testing.assert_allclose(
        transposed @ found, np.broadcast_to(np.eye(size), moved.shape), atol=1e-5
    )
    # R = Qᵀ A of a QR decomposition is upper triangular.
    np.testing.assert_allclose(np.tril(transposed @ moved, -1), 0.0, atol=1e-6)


@pytest.mark.parametrize(
    "platform, method",
    [
        ("cpu", householder_qr),
        ("tpu", householder_qr),
        ("cuda", shifted_cholesky_qr),
        ("rocm", shifted_cholesky_qr),
    ],
)
def test_the_platform_chooses_how_to_orthonormalize(platform, method):
    def calls(function: Any) -> set[Any]:
        a = jax.ShapeDtypeStruct((4, 64, 64), jnp.float32)
        program = jax.export.export(jax.jit(function), platforms=(platform,))(a).mlir_module()
        return set(re.findall(r"custom_call @(\w+)|stablehlo\.(cholesky)", program))

    other = householder_qr if method is shifted_cholesky_qr else shifted_cholesky_qr
    assert calls(orthonormal) == calls(method) != calls(other)


def test_what_pads_a_stack_makes_no_nan_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_eigenbasis, "orthonormal", shifted_cholesky_qr)  # as on GPUs
    zeros = jnp.zeros((2, 3, 3))
    with jax.debug_nans(True):
        np.testing.assert_array_equal(_eigenbasis.power_step(zeros, zeros), zeros)


@pytest.mark.parametrize("stack_sharding", [None, on_one_device("x")])
def test_bases_that_are_refreshed_together_are_those_refreshed_apart(
    stack_sharding: NamedSharding | None,
) -> None:
    shapes = [(2, 4, 6), (2, 6, 4), (2, 2, 4), (3, 4, 4)]
    rng = np.random.default_rng(0)
    xs = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]

    def observed(shape: tuple[int, ...], x: jax.Array) -> Any:
        view = matrix_view(
            shape, (1,), (2,), max_size=9, block_size=2, stack_sharding=stack_sharding
        )
        leaves = TurnedLeaves.of([x], [view])
        bases = (leaves.views[0].init(x),)
        return leaves.views[0], leaves.observe(bases, leaves.matrices([x]), 0.5)[0][0]

    views, bases = zip(*map(observed, shapes, xs), strict=True)
    step = jax.jit(refresh, static_argnums=0)
    apart = tuple(step((view,), [basis])[0] for view, basis in zip(views, bases, strict=True))
    chex.assert_trees_all_equal(step(views, bases), apart)
    # All blocks are 2 x 2. Under `shard_map` all are one stack; the program has both platforms'.
    program = str(jax.make_jaxpr(refresh, static_argnums=0)(views, bases))
    assert program.count(" qr[") == 2
