"""One process of `test_distributed.py`: trains on a mesh over all processes and saves what it has.

python -m tests.library.distributed_worker ADDRESS PROCESSES PROCESS DEVICES OUTPUT
"""

import sys
from typing import Any

import jax


def train(output: str) -> None:
    """Trains a small classifier, batch and params sharded over all devices of all processes."""
    import jax.numpy as jnp  # noqa: PLC0415 - after jax.distributed
    import numpy as np  # noqa: PLC0415
    import optax  # noqa: PLC0415
    from jax.experimental import multihost_utils  # noqa: PLC0415
    from jax.sharding import NamedSharding, PartitionSpec  # noqa: PLC0415

    import sophia_optax  # noqa: PLC0415

    mesh = jax.make_mesh((len(jax.devices()),), ("fsdp",))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    rng = np.random.default_rng(0)

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, rows, lambda index: x[index])

    features = put(rng.normal(size=(16, 8)).astype(np.float32))
    labels = put(rng.integers(0, 4, 16))
    params = {
        "in": put(rng.normal(size=(8, 16)).astype(np.float32) / 3),
        "out": put(rng.normal(size=(16, 4)).astype(np.float32) / 4),
    }
    tx = sophia_optax.sophia_g(2e-2, update_interval=2)

    def logits_fn(params: Any, features: jax.Array) -> jax.Array:
        with_rows = PartitionSpec("fsdp", None)
        hidden = jax.nn.tanh(
            jnp.einsum("bi,ij->bj", features, params["in"], out_sharding=with_rows)
        )
        return jnp.einsum("bj,jk->bk", hidden, params["out"], out_sharding=with_rows)

    def loss_fn(params: Any, features: jax.Array, labels: jax.Array) -> jax.Array:
        one_hot = jax.nn.one_hot(labels, 4)
        return -jnp.mean(
            jnp.sum(jax.nn.log_softmax(logits_fn(params, features)) * one_hot, axis=-1)
        )

    @jax.jit
    def train_step(params: Any, state: Any, features: jax.Array, labels: jax.Array) -> Any:
        grads = jax.grad(loss_fn)(params, features, labels)
        hessian_fn = sophia_optax.gauss_newton_bartlett(lambda p: logits_fn(p, features), params)
        updates, state = tx.update(grads, state, params, hessian_fn=hessian_fn)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
        for _ in range(6):
            params, state = train_step(params, state, features, labels)
        everything = multihost_utils.process_allgather((params, state), tiled=True)
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(everything)]
    np.savez(output, **dict(zip(names, jax.tree.leaves(everything), strict=True)))


if __name__ == "__main__":
    address, processes, process, devices, output = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    if int(processes) > 1:
        jax.distributed.initialize(address, int(processes), int(process))
    train(output)
