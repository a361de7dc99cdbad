"""What XLA for TPU makes of the update and of a whole step, compiled on a machine without a TPU.

Needs the extra `tpu`: `pip install -e '.[test,tpu]'`.
"""

import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import sophia_optax
from benchmarks.lib import programs
from examples.lm import plan
from examples.lm.__main__ import main
from examples.lm.config import MODELS, ModelConfig
from examples.lm.model import Transformer
from examples.lm.run import resolve
from sophia_optax._win_rate_target import TRIAL_FACTORS
from tests import hlo

pytest.importorskip("libtpu", reason="the TPU compiler comes with the extra 'tpu'")

SIDE = 8192
SIZE = SIDE * SIDE
PARAMS = {name: jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32) for name in "ab"}
ONE_PASS = 4 * SIZE * len(PARAMS)


# What is compiled without a TPU cannot be read back from the compilation cache.
pytestmark = pytest.mark.usefixtures("no_cache")


@pytest.fixture(scope="module")
def devices() -> Any:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies  # noqa: PLC0415 - reads the environment

    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


def loss(params: Any) -> jax.Array:
    return sum(jnp.sum(jnp.cos(x)) for x in params.values())


def hessian_fn(params: Any) -> Any:
    return sophia_optax.hutchinson(loss, params)


def accessed(compiled: Any) -> float:
    return compiled.cost_analysis()["bytes accessed"] / ONE_PASS


def temporaries(compiled: Any) -> float:
    return compiled.memory_analysis().temp_size_in_bytes / ONE_PASS


@pytest.fixture(scope="module")
def sophia() -> Any:
    return sophia_optax.sophia_h(1e-3, weight_decay=0.1)


def test_a_step_off_a_refresh_takes_six_passes_where_adamw_takes_seven(
    devices: Any, sophia: Any
) -> None:
    chip = SingleDeviceSharding(devices[0])
    off = hlo.donated_step(sophia, PARAMS, chip, refresh=False)
    adamw = hlo.donated_step(optax.adamw(1e-3, weight_decay=0.1), PARAMS, chip)
    assert accessed(off) <= 6.05
    assert accessed(adamw) >= 6.95
    assert temporaries(off) <= 0.01


def squares(params: Any) -> Any:
    return lambda key: jax.tree.map(jnp.square, params)


@pytest.mark.parametrize(
    ("hessian_fn", "keywords"),
    [
        (hessian_fn, {}),
        (hessian_fn, {"absolute_curvature": False}),
        (squares, {"max_estimate_ratio": 100.0}),
        # Read once more, for which XLA would keep an estimate that is dear to compute again.
        (squares, {"gamma": sophia_optax.win_rate_target()}),
        (squares, {"gamma": sophia_optax.win_rate_target(per_tensor=False)}),
        (squares, {"gamma": sophia_optax.win_rate_target(weighted=True)}),
    ],
)
def test_the_branch_costs_no_copy_no_temporary_and_no_pass(
    devices: Any, hessian_fn: Any, keywords: dict[str, Any]
) -> None:
    sophia = sophia_optax.sophia_h(1e-3, weight_decay=0.1, **keywords)
    compiled = hlo.donated_step(
        sophia, PARAMS, SingleDeviceSharding(devices[0]), hessian_fn=hessian_fn
    )
    entry = hlo.entry_passes(compiled, SIZE) / len(PARAMS)
    assert entry <= 6.05
    assert temporaries(compiled) <= 0.01
    assert hlo.copies(compiled, SIZE) == 0


def test_the_check_sees_what_the_order_use_then_refresh_costs(devices: Any) -> None:
    contrib = hlo.donated_step(
        optax.contrib.sophia(1e-3),
        PARAMS,
        SingleDeviceSharding(devices[0]),
        obj_fn=lambda params: loss,
    )
    assert hlo.copies(contrib, SIZE) >= 2
    assert temporaries(contrib) >= 0.95


def test_a_sharded_refresh_adds_one_all_reduce_of_scalars(devices: Any, sophia: Any) -> None:
    mesh = jax.sharding.Mesh(devices, ("fsdp",))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp", None))
    estimate = hlo.donated_step(
        sophia,
        PARAMS,
        sharding,
        hessian_fn=squares,
    )
    assert hlo.collectives(estimate) == {"all-reduce": 1}
    assert not hlo.collectives(estimate, more_than=1)


@pytest.mark.parametrize(
    "per_tensor, weighted", [(False, False), (True, False), (False, True), (True, True)]
)
def test_a_win_rate_target_adds_one_more_and_a_weighted_one_two(
    devices: Any, per_tensor: bool, weighted: bool
) -> None:
    sharding = NamedSharding(jax.sharding.Mesh(devices, ("fsdp",)), PartitionSpec("fsdp", None))
    gamma = sophia_optax.win_rate_target(per_tensor=per_tensor, weighted=weighted)
    compiled = hlo.donated_step(
        sophia_optax.sophia_g(1e-3, gamma=gamma),
        PARAMS,
        sharding,
        hessian_fn=squares,
        refresh=True,
    )
    instructions = hlo.instructions(compiled.as_text())
    sizes = [sizes for opcode, sizes in instructions if opcode in hlo.COLLECTIVES]
    assert len(sizes) == (3 if weighted else 2)
    assert max(map(max, sizes)) <= (len(TRIAL_FACTORS) + 2 if weighted else len(devices))


WIDE = ModelConfig(layers=2, width=768, heads=12, context=1024, vocab_size=50257)


def test_on_every_array_of_a_transformer_it_is_six_passes_to_adamws_seven(
    devices: Any, sophia: Any
) -> None:
    params = jax.eval_shape(lambda: nnx.state(Transformer(WIDE, nnx.Rngs(0)), nnx.Param))
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    chip = SingleDeviceSharding(devices[0])
    off = programs.donated_update(sophia, params, chip, refresh=False)
    adamw = programs.donated_update(optax.adamw(1e-3, weight_decay=0.1), params, chip)
    assert programs.main_memory_bytes(off.as_text()) / size == pytest.approx(6, rel=1e-3)
    assert programs.main_memory_bytes(adamw.as_text()) / size == pytest.approx(7, rel=1e-3)


def test_a_plan_from_end_to_end(tmp_path: Any, capsys: Any) -> None:
    path = tmp_path / "plan.json"
    arguments = ["plan", "--model", "tiny", "--topology", "v5e:2x2", "--json", str(path)]
    assert main(arguments) == 0
    row = json.loads(path.read_text())["sophia_g"]
    assert row["state_bytes"] == pytest.approx(2 * row["params_bytes"], rel=0.01)
    standing = row["params_bytes"] + row["state_bytes"]
    assert row["peak_bytes"] >= row["temp_bytes"] + standing
    assert row["hbm_bytes"] == 16 * 2**30
    assert row["flops_step"] < row["flops_average"] <= 1.01 * row["flops_step"]
    microbatches, layers = 4, MODELS["tiny"].layers
    gathered_forward_and_backward = 2 * 4 * layers * microbatches
    assert row["collectives"]["all-gather"]["count"] >= gathered_forward_and_backward
    assert "sophia_g" in capsys.readouterr().out


def test_a_plans_flops_are_those_that_the_tpu_compiler_counts(devices: Any) -> None:
    config = plan.PlanConfig(
        model="tiny", topology="v5e:2x2", batch_per_chip=4, accumulate=1, curvature_share=4
    )
    run = resolve(plan.run_config(config, "sophia_g", chips=4), devices=devices)
    compiled = plan.lowered_step(run, refresh=True, unroll=True)[1].compile()
    assert plan.flops(run, refresh=True) / 4 == pytest.approx(
        compiled.cost_analysis()["flops"], rel=0.1
    )


def test_an_eigenbasis_exchanges_arrays_and_neither_gathers_nor_sums_them(devices: Any) -> None:
    mesh = jax.make_mesh((4,), ("fsdp",), (jax.sharding.AxisType.Auto,), devices=devices)
    params = {
        "even": jax.ShapeDtypeStruct((4, 512, 512), jnp.float32),
        "uneven": jax.ShapeDtypeStruct((3, 512, 256), jnp.float32),
    }
    columns = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
    stacks = NamedSharding(mesh, PartitionSpec("fsdp"))
    tx = sophia_optax.in_eigenbasis(
        optax.trace(0.9), basis_interval=1, block_size=256, stack_sharding=stacks
    )
    state = jax.eval_shape(tx.init, params)
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda leaf: columns if leaf.ndim == 3 else whole, state)
    blocks = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
    bases = jax.tree.map(lambda _: blocks, state.bases)
    shardings = shardings._replace(bases=bases)
    step = jax.jit(
        lambda g, state: tx.update(g, state, refresh_basis=True),
        in_shardings=(columns, shardings),
        out_shardings=(columns, shardings),
    )
    compiled = step.lower(params, state).compile()
    instructions = hlo.instructions(compiled.as_text())
    # The norm of each matrix and two flags are summed.
    large = [op for op, sizes in instructions if op in hlo.COLLECTIVES and max(sizes) > 4]
    assert set(large) == {"all-to-all"}
