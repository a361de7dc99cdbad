"""Which device holds what: one table from logical axes to mesh axes."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import sophia_optax

from .config import MeshConfig, UsageError

MESH_AXES = ("data", "fsdp", "tensor")

# Params name their axes when they are made (model.py), activations where they are constrained.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "features": None,
    "layers": None,
    "position": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "qkv": None,
    "heads": "tensor",
    "head_features": None,
    "mlp": "tensor",
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices, `[data, fsdp, tensor]`."""
    devices = jax.devices() if devices is None else devices
    shape = [config.data, config.fsdp, config.tensor]
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UsageError(f"A mesh of {shape} has no size. Give sizes of 1 or more, one of them -1.")
    if -1 in shape:
        shape[shape.index(-1)] = max(len(devices) // -math.prod(shape), 1)
    if math.prod(shape) != len(devices):
        raise UsageError(
            f"A mesh of {' x '.join(map(str, shape))} (data x fsdp x tensor) needs "
            f"{math.prod(shape)} devices and there are {len(devices)}. Change --mesh.*."
        )
    return jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * 3, devices=devices)


def sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """The table's sharding of an array; an axis that its devices do not divide stays whole."""
    spec = []
    for name, size in zip(axes, shape, strict=True):
        mesh_axes = None if name is None else RULES[name]
        names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
        divides = size % math.prod(mesh.shape[n] for n in names) == 0
        spec.append(mesh_axes if divides else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the devices that see different data."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def batch_shards(mesh: Mesh) -> int:
    """How many parts a batch is cut into."""
    return math.prod(mesh.shape[name] for name in RULES["batch"] or ())


def constrain(x: jax.Array, mesh: Mesh | None, *axes: str) -> jax.Array:
    """Pins an activation to the table's sharding."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, sharding(mesh, axes, x.shape))


def shardings(mesh: Mesh, abstract_state: Any) -> Any:
    """A NamedSharding for each array: by its axes in the params and in what mirrors them.

    An optimizer's averages are trees of `nnx.Param` too, with the axes that the params were made
    with; its counters are not, and lie on every device. The bases of `in_eigenbasis` are stacks of
    blocks, and are spread over the devices that hold different params.
    """
    kinds = (nnx.Param, sophia_optax.InEigenbasisState)

    def place(node: Any) -> Any:
        if isinstance(node, nnx.Param):
            return jax.tree.map(lambda leaf: sharding(mesh, node.axes, leaf.shape), node)
        if isinstance(node, sophia_optax.InEigenbasisState):
            bases = jax.tree.map(lambda leaf: spread(mesh, leaf.shape), node.bases)
            return shardings(mesh, node._replace(bases=()))._replace(bases=bases)
        return replicated(mesh)

    def is_leaf(node: Any) -> bool:
        return isinstance(node, kinds) and getattr(node, "bases", None) != ()

    return jax.tree.map(place, abstract_state, is_leaf=is_leaf)


def spread(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """The sharding of an array by its first axis that `fsdp` divides."""
    divisible = (i for i, size in enumerate(shape) if size % mesh.shape["fsdp"] == 0)
    first = next(divisible, len(shape))
    spec = [None] * first + ["fsdp"] if first < len(shape) else []
    return NamedSharding(mesh, PartitionSpec(*spec))


def stack_sharding(mesh: Mesh) -> NamedSharding:
    """How `in_eigenbasis` spreads a stack of matrices: over the devices with different params."""
    return NamedSharding(mesh, PartitionSpec("fsdp"))


def local_rows(batch_size: int) -> slice:
    """The rows of a global batch that this process provides."""
    rows = batch_size // jax.process_count()
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def global_batch(local: np.ndarray, mesh: Mesh) -> jax.Array:
    """The processes' rows, one after another, as one sharded array."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), local)
