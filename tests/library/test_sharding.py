"""On a mesh of 8 devices: where the state lives, what is communicated, and that numbers agree."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sophia_optax
from sophia_optax._win_rate_target import SMALL, TRIAL_FACTORS, unclipped_counts
from tests import hlo

BATCH, LENGTH, VOCABULARY, WIDTH, HIDDEN = 16, 4, 32, 16, 64
PREDICTIONS = BATCH * LENGTH

# The mesh (data, tensor), and for each parameter the mesh axes of its dimensions.
LAYOUTS = {
    "data": ((8, 1), {"embed": (), "up": (), "bias": ()}),
    "fsdp": ((8, 1), {"embed": ("data",), "up": ("data",), "bias": ("data",)}),
    "tensor": (
        (2, 4),
        {"embed": ("tensor", None), "up": (None, "tensor"), "bias": ("tensor",)},
    ),
    "fsdp and tensor": (
        (2, 4),
        {"embed": ("tensor", "data"), "up": ("data", "tensor"), "bias": ("tensor",)},
    ),
}


# Of 2, 4 and 8 devices.
MESHES = [(d, t) for d in (1, 2, 4, 8) for t in (1, 2, 4, 8) if 1 < d * t <= 8]


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """A small language model on a mesh, as it is written for Auto and for Explicit axes.

    Its two matrices are used twice each, once split over what is summed and once over what is not.
    """

    mesh: jax.sharding.Mesh
    explicit: bool
    params: Any
    tokens_BxT: jax.Array

    def put(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Says how an intermediate array is sharded."""
        spec = PartitionSpec(*axes)
        if self.explicit:
            return jax.sharding.reshard(x, spec)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def dot(self, equation: str, x: jax.Array, y: jax.Array, *axes: str | None) -> jax.Array:
        """An einsum whose result is sharded over the given axes."""
        if self.explicit:
            return jnp.einsum(equation, x, y, out_sharding=PartitionSpec(*axes))
        return self.put(jnp.einsum(equation, x, y), *axes)

    def one_hot(self, tokens_BxT: jax.Array) -> jax.Array:
        return self.put(jax.nn.one_hot(tokens_BxT, VOCABULARY), "data", None, "tensor")

    def logits(self, params: Any) -> jax.Array:
        embed_VxD = self.put(params["embed"], "tensor", None)
        up_DxF = self.put(params["up"], None, "tensor")
        bias_F = self.put(params["bias"], "tensor")
        x_BxTxV = self.one_hot(self.tokens_BxT)
        x_BxTxD = self.dot("btv,vd->btd", x_BxTxV, embed_VxD, "data", None, None)
        h_BxTxF = self.dot("btd,df->btf", x_BxTxD, up_DxF, "data", None, "tensor")
        h_BxTxF = jnp.tanh(h_BxTxF + bias_F)
        x_BxTxD += self.dot("btf,df->btd", h_BxTxF, up_DxF, "data", None, None)
        return self.dot("btd,vd->btv", x_BxTxD, embed_VxD, "data", None, "tensor")

    def loss(self, params: Any) -> jax.Array:
        targets_BxTxV = self.one_hot((self.tokens_BxT * 5 + 1) % VOCABULARY)
        return -jnp.sum(jax.nn.log_softmax(self.logits(params)) * targets_BxTxV) / PREDICTIONS

    def on(self, params: Any, tokens_BxT: jax.Array) -> "Setup":
        return dataclasses.replace(self, params=params, tokens_BxT=tokens_BxT)


def setup_on(mesh_shape: tuple[int, int], specs: Any, axis_type: AxisType) -> Setup:
    mesh = jax.make_mesh(
        mesh_shape,
        ("data", "tensor"),
        axis_types=(axis_type,) * 2,
        devices=jax.devices()[: mesh_shape[0] * mesh_shape[1]],
    )
    rng = np.random.default_rng(0)
    shapes = {"embed": (VOCABULARY, WIDTH), "up": (WIDTH, HIDDEN), "bias": (HIDDEN,)}
    params = {
        name: jax.device_put(
            0.3 * rng.normal(size=shape).astype(np.float32),
            NamedSharding(mesh, PartitionSpec(*specs[name])),
        )
        for name, shape in shapes.items()
    }
    tokens_BxT = jax.device_put(
        rng.integers(0, VOCABULARY, (BATCH, LENGTH)),
        NamedSharding(mesh, PartitionSpec("data", None)),
    )
    return Setup(mesh, axis_type == AxisType.Explicit, params, tokens_BxT)


@pytest.fixture(params=["Auto", "Explicit"])
def axis_type(request: pytest.FixtureRequest) -> AxisType:
    return getattr(AxisType, request.param)


@functools.cache
def setup_named(layout: str, axis_type: AxisType) -> Setup:
    return setup_on(*LAYOUTS[layout], axis_type)


@pytest.fixture(params=list(LAYOUTS))
def setup(request: pytest.FixtureRequest, axis_type: AxisType) -> Any:
    setup = setup_named(request.param, axis_type)
    with jax.set_mesh(setup.mesh):
        yield setup


def shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def hessian_fn_of(setup: Setup, estimator: str, params: Any) -> sophia_optax.HessianFn:
    if estimator == "hutchinson":
        return sophia_optax.hutchinson(setup.loss, params)
    return sophia_optax.gauss_newton_bartlett(setup.logits, params, sampling=estimator)


@functools.cache
def derivative_alone(layout: str, axis_type: AxisType, kind: str) -> Any:
    """The derivative that an estimator takes, in a direction that is there already."""
    setup = setup_named(layout, axis_type)

    def hessian_vector(params: Any, tokens_BxT: jax.Array, u: Any) -> Any:
        return jax.jvp(jax.grad(setup.on(params, tokens_BxT).loss), (params,), (u,))[1]

    def vector_jacobian(params: Any, tokens_BxT: jax.Array, r_BxTxV: jax.Array) -> Any:
        logits_BxTxV, pullback = jax.vjp(setup.on(params, tokens_BxT).logits, params)
        return pullback(r_BxTxV + jax.nn.softmax(logits_BxTxV))[0]

    if kind == "hutchinson":
        function, direction = hessian_vector, setup.params
    else:
        function = vector_jacobian
        direction = jax.device_put(
            np.ones((BATCH, LENGTH, VOCABULARY), np.float32),
            NamedSharding(setup.mesh, PartitionSpec("data", None, "tensor")),
        )
    jitted = jax.jit(function, out_shardings=shardings(setup.params))
    return jitted.lower(setup.params, setup.tokens_BxT, direction).compile()


@pytest.mark.parametrize("make", [sophia_optax.sophia_h, sophia_optax.sophia_g])
def test_state_is_born_in_the_shardings_of_the_params(setup: Setup, make: Any) -> None:
    state = jax.jit(make(1e-2, mu_dtype=jnp.bfloat16).init)(setup.params)[0]
    for name, param in setup.params.items():
        assert state.mu[name].sharding.is_equivalent_to(param.sharding, param.ndim)
        assert state.nu[name].sharding.is_equivalent_to(param.sharding, param.ndim)


@pytest.mark.parametrize(
    ("layout", "estimator"),
    [
        ("data", "hutchinson"),
        ("fsdp", "hutchinson"),
        ("tensor", "hutchinson"),
        ("fsdp and tensor", "hutchinson"),
        ("data", "labels"),
        ("fsdp", "labels"),
        ("fsdp and tensor", "labels"),
        ("fsdp and tensor", "curvature_propagation"),
    ],
)
def test_an_estimator_communicates_what_its_derivative_does(
    layout: str, axis_type: AxisType, estimator: str
) -> None:
    setup = setup_named(layout, axis_type)

    def estimate(params: Any, tokens_BxT: jax.Array, key: jax.Array) -> Any:
        return hessian_fn_of(setup.on(params, tokens_BxT), estimator, params)(key)

    key = jax.eval_shape(jax.random.key, 0)
    with jax.set_mesh(setup.mesh):
        jitted = jax.jit(estimate, out_shardings=shardings(setup.params))
        compiled = jitted.lower(setup.params, setup.tokens_BxT, key).compile()
        kind = "hutchinson" if estimator == "hutchinson" else "gauss_newton_bartlett"
        alone = derivative_alone(layout, axis_type, kind)
    more = hlo.collectives(compiled) - hlo.collectives(alone)
    if estimator == "hutchinson" or setup.mesh.shape["tensor"] == 1:
        assert not more
    else:
        # A draw from a sharded vocabulary needs one number a prediction from every shard, as the
        # normaliser of the softmax does. Anything larger would be a vocabulary gathered.
        assert more == {"all-reduce": 1}
        predictions = PREDICTIONS // setup.mesh.shape["data"]
        assert not hlo.collectives(compiled, predictions) - hlo.collectives(alone, predictions)


FIXED_GAMMA = sophia_optax.sophia_g(1e-2, gamma=0.05)
TARGETS = {
    name: sophia_optax.sophia_g(1e-2, gamma=sophia_optax.win_rate_target(0.7, weighted=weighted))
    for name, weighted in {"counted": False, "weighted": True}.items()
}


@functools.cache
def compiled_update(setup: Setup, tx: Any, refresh: bool | None) -> Any:
    """The update alone, with an estimate that is there already."""
    state = jax.jit(tx.init)(setup.params)

    def update(params: Any, state: Any, grads: Any, estimate: Any) -> Any:
        updates, state = tx.update(
            grads, state, params, hessian_fn=lambda key: estimate, refresh=refresh
        )
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(update, out_shardings=(shardings(setup.params), shardings(state)))
    return jitted.lower(setup.params, state, setup.params, setup.params).compile()


@pytest.mark.parametrize("kind", TARGETS)
def test_a_win_rate_target_adds_one_sum_over_the_devices_and_only_in_a_refresh(
    setup: Setup, kind: str
) -> None:
    """One of the counts of all leaves, where a fixed γ has the one of the win rate alone.

    If it is weighted, one of the largest momenta of all leaves too.
    """
    assert not hlo.collectives(compiled_update(setup, TARGETS[kind], refresh=False))
    compiled = compiled_update(setup, TARGETS[kind], refresh=True)
    assert set(hlo.collectives(compiled)) <= {"all-reduce"}
    assert not hlo.collectives(compiled, more_than=len(TRIAL_FACTORS) + 2)
    # Where leaves are split over different axes, XLA sums over each of them in turn.
    fixed = compiled_update(setup, FIXED_GAMMA, refresh=True)
    sums, sums_of_fixed = (
        [opcode for opcode, _ in hlo.instructions(program.as_text())].count("all-reduce")
        for program in (compiled, fixed)
    )
    assert sums <= (3 if kind == "weighted" else 2) * sums_of_fixed


def test_a_win_rate_target_moves_a_number_a_device_for_a_count_of_a_large_leaf() -> None:
    """XLA gathers the counts, where it could add them."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    leaf = jax.ShapeDtypeStruct((2 * SMALL,), jnp.float32, sharding=rows)
    counted = jax.jit(unclipped_counts, out_shardings=NamedSharding(mesh, PartitionSpec()))
    assert not hlo.collectives(counted.lower(leaf, leaf).compile(), more_than=mesh.size)


def test_the_update_communicates_scalars_alone_and_only_in_a_refresh(setup: Setup) -> None:
    sharded = any(axis for x in jax.tree.leaves(setup.params) for axis in x.sharding.spec)
    assert not hlo.collectives(compiled_update(setup, FIXED_GAMMA, refresh=False))
    for refresh in (True, None):
        compiled = compiled_update(setup, FIXED_GAMMA, refresh=refresh)
        assert not hlo.collectives(compiled, more_than=1)
        assert set(hlo.collectives(compiled)) == ({"all-reduce"} if sharded else set())


def train(setup: Setup, estimator: str, steps: int = 12) -> tuple[Any, Any, np.ndarray]:
    """The params and the state after the steps, and the losses before each."""
    make = sophia_optax.sophia_h if estimator == "hutchinson" else sophia_optax.sophia_g
    tx = make(1e-2, update_interval=3)

    @jax.jit
    def train_step(params: Any, state: Any, tokens_BxT: jax.Array) -> Any:
        here = setup.on(params, tokens_BxT)
        loss, grads = jax.value_and_grad(here.loss)(params)
        hessian_fn = hessian_fn_of(here, estimator, params)
        updates, state = tx.update(grads, state, params, hessian_fn=hessian_fn)
        return optax.apply_updates(params, updates), state, loss

    params, losses = setup.params, []
    state = jax.jit(tx.init)(params)
    before = shardings(state)
    for _ in range(steps):
        params, state, loss = train_step(params, state, setup.tokens_BxT)
        losses.append(float(loss))
    for old, new, x in zip(*map(jax.tree.leaves, (before, shardings(state), state)), strict=True):
        assert new.is_equivalent_to(old, x.ndim)
    return *jax.device_get((params, state)), np.asarray(losses)


@functools.cache
def trained_on_one_device(estimator: str) -> tuple[Any, Any, np.ndarray]:
    setup = setup_on((1, 1), LAYOUTS["data"][1], AxisType.Auto)
    with jax.set_mesh(setup.mesh):
        return train(setup, estimator)


@pytest.mark.parametrize(
    ("layout", "estimator"),
    [
        ("data", "hutchinson"),
        ("fsdp", "labels"),
        ("tensor", "hutchinson"),
        ("fsdp and tensor", "labels"),
    ],
)
def test_eight_devices_give_the_numbers_of_one(
    layout: str, axis_type: AxisType, estimator: str
) -> None:
    check_numbers_of_one_device(setup_named(layout, axis_type), estimator)


@pytest.mark.stress
@pytest.mark.parametrize("estimator", ["hutchinson", "labels"])
@pytest.mark.parametrize("shape", MESHES, ids=lambda shape: "x".join(map(str, shape)))
def test_every_mesh_gives_the_numbers_of_one_device(
    shape: tuple[int, int], axis_type: AxisType, estimator: str
) -> None:
    _, specs = LAYOUTS["fsdp and tensor"]
    check_numbers_of_one_device(setup_on(shape, specs, axis_type), estimator)


def check_numbers_of_one_device(setup: Setup, estimator: str) -> None:
    with jax.set_mesh(setup.mesh):
        params, state, losses = train(setup, estimator)
    params_1, state_1, losses_1 = trained_on_one_device(estimator)
    win_rate, win_rate_1 = (sophia_optax.diagnostics(x).win_rate for x in (state, state_1))
    np.testing.assert_allclose(losses, losses_1, rtol=2e-5)
    np.testing.assert_allclose(win_rate, win_rate_1, atol=2e-3)
    assert losses[-1] < losses[0] - 0.1
    for name in params:
        np.testing.assert_allclose(params[name], params_1[name], atol=2e-4)


def test_a_curvature_batch_stays_on_the_devices_it_was_on(axis_type: AxisType) -> None:
    setup = setup_on(*LAYOUTS["data"], axis_type)
    with jax.set_mesh(setup.mesh):
        jitted = jax.jit(lambda x: sophia_optax.curvature_batch(x, 8))
        compiled = jitted.lower(setup.tokens_BxT).compile()
        assert not hlo.collectives(compiled)
        taken = jitted(setup.tokens_BxT)
    assert taken.sharding.is_equivalent_to(setup.tokens_BxT.sharding, 2)
    np.testing.assert_array_equal(taken, np.asarray(setup.tokens_BxT)[::2])


def test_a_curvature_batch_that_leaves_devices_without_examples_is_refused() -> None:
    setup = setup_on(*LAYOUTS["data"], AxisType.Explicit)
    with (
        jax.set_mesh(setup.mesh),
        pytest.raises(ValueError, match=r"size is 4.*8 shards.*multiple"),
    ):
        jax.jit(lambda x: sophia_optax.curvature_batch(x, 4))(setup.tokens_BxT)


def test_estimates_in_chunks_and_under_multi_steps_keep_explicit_shardings() -> None:
    setup = setup_on(*LAYOUTS["fsdp and tensor"], AxisType.Explicit)
    with jax.set_mesh(setup.mesh):
        tx = optax.MultiSteps(sophia_optax.sophia_h(1e-2), 2)
        state = jax.jit(tx.init)(setup.params)

        @jax.jit
        def estimate(params: Any, state: Any, tokens_BxT: jax.Array) -> Any:
            hessian_fn = sophia_optax.hutchinson(
                setup.on(params, tokens_BxT).loss, params, num_probes=4, probe_chunk=2
            )
            return sophia_optax.on_emit(hessian_fn, state, 2)(jax.random.key(0))

        result = estimate(setup.params, state, setup.tokens_BxT)
    assert shardings(result) == shardings(setup.params)
