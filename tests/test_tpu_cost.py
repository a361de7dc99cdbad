"""What XLA for TPU v5e makes of the update, compiled ahead of time on a machine without one.

Needs the extra `tpu`: `pip install -e '.[test,tpu]'`.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import sophia_optax
from tests import hlo

pytest.importorskip("libtpu", reason="the TPU compiler comes with the extra 'tpu'")

SIDE = 8192
SIZE = SIDE * SIDE
PARAMS = {name: jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32) for name in "ab"}
ONE_PASS = 4 * SIZE * len(PARAMS)


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


def test_the_branch_costs_no_copy_no_temporary_and_no_pass(devices: Any, sophia: Any) -> None:
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
        hessian_fn=lambda params: lambda key: jax.tree.map(jnp.square, params),
    )
    assert hlo.collectives(estimate) == {"all-reduce": 1}
    assert not hlo.collectives(estimate, more_than=1)
