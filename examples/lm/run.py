"""A run, resolved: what its flags stand for, looked up and checked once, in one place."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from .config import (
    Hyperparameters,
    ModelConfig,
    TrainConfig,
    UsageError,
    check,
    lookup,
    model_of,
)
from .mesh import batch_shards, make_mesh
from .optimizers import OPTIMIZERS, Optimizer, hyperparameters


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
      config: its flags.
      optimizer: the row of the table.
      hyperparameters: those of the flags, and the row's for the rest.
      model: the transformer. Its vocabulary is None until `with_vocabulary`, if the tokenizer
        decides it.
      mesh: the devices.
      curvature_batch: how many sequences a curvature estimate sees.
    """

    config: TrainConfig
    optimizer: Optimizer
    hyperparameters: Hyperparameters
    model: ModelConfig
    mesh: Mesh
    curvature_batch: int

    def with_vocabulary(self, size: int) -> "Run":
        """This run on data of that many different tokens."""
        preset = self.model.vocab_size
        if preset is not None and preset < size:
            raise UsageError(
                f"{self.config.model} knows {preset} tokens and the data has {size}. "
                "Choose a smaller vocabulary or another model."
            )
        return dataclasses.replace(
            self, model=dataclasses.replace(self.model, vocab_size=preset or size)
        )


def resolve(
    config: TrainConfig,
    row: Optimizer | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Run:
    """Looks up and checks everything that a run's flags name.

    Args:
      config: the flags.
      row: the optimizer; the one that `config.optimizer` names if left out.
      devices: all of them if left out.

    Raises:
      UsageError: something does not exist, is out of range or does not divide.
    """
    row = row or lookup(OPTIMIZERS, config.optimizer, "optimizer")
    check(config)
    device_mesh = make_mesh(config.mesh, devices)
    check_batch(config, device_mesh)
    model = model_of(config)
    size = config.curvature_batch or half(config.batch_size, batch_shards(device_mesh))
    if row.curvature is not None and not row.curvature.whole_batch:
        check_curvature_batch(config, size, device_mesh)
    return Run(
        config=config,
        optimizer=row,
        hyperparameters=hyperparameters(config, row, model),
        model=model,
        mesh=device_mesh,
        curvature_batch=(
            config.batch_size if row.curvature and row.curvature.whole_batch else size
        ),
    )


def half(batch_size: int, shards: int) -> int:
    """The largest part of a batch, up to its half, that divides it and spreads over the devices."""
    parts = range(shards, max(batch_size // 2, shards) + 1, shards)
    return max((size for size in parts if batch_size % size == 0), default=batch_size)


def check_batch(config: TrainConfig, device_mesh: Mesh) -> None:
    """Tells the user of a batch that cannot be cut as asked."""
    if config.attention == "cudnn" and device_mesh.devices.flat[0].platform != "gpu":
        raise UsageError("--attention cudnn needs an NVIDIA GPU. Leave it out.")
    if config.batch_size % jax.process_count():
        raise UsageError(
            f"--batch-size {config.batch_size} does not divide over {jax.process_count()} "
            "processes. Choose a multiple."
        )
    shards = batch_shards(device_mesh)
    parts = config.accumulate * shards
    if config.batch_size % parts:
        raise UsageError(
            f"--batch-size {config.batch_size} over --accumulate {config.accumulate} does not "
            f"divide over {shards} device(s). Choose a multiple of {parts}."
        )


def check_curvature_batch(config: TrainConfig, size: int, device_mesh: Mesh) -> None:
    """Tells the user of a part of the batch that cannot be taken from it."""
    shards = batch_shards(device_mesh)
    if size % shards:
        raise UsageError(
            f"--curvature-batch {size} does not divide over {shards} device(s). "
            f"Choose a multiple of {shards}."
        )
    if config.batch_size % size:
        raise UsageError(
            f"--curvature-batch {size} does not divide --batch-size {config.batch_size}. "
            "Choose a divisor."
        )
