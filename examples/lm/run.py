"""A run, resolved: what its flags stand for, looked up and checked once, in one place."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from examples.lm.config import (
    MODELS,
    Hyperparameters,
    ModelConfig,
    TrainConfig,
    UsageError,
    check_numbers,
    lookup,
)
from examples.lm.mesh import batch_shards, make_mesh
from examples.lm.optimizers import OPTIMIZERS, Optimizer, hyperparameters


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
    check_numbers(config)
    device_mesh = make_mesh(config.mesh, devices)
    size = config.batch_size // 2 if config.curvature_batch is None else config.curvature_batch
    check_batches(config, size, device_mesh)
    return Run(
        config=config,
        optimizer=row,
        hyperparameters=hyperparameters(config, row),
        model=lookup(MODELS, config.model, "model"),
        mesh=device_mesh,
        curvature_batch=(
            config.batch_size if row.curvature and row.curvature.whole_batch else size
        ),
    )


def check_batches(config: TrainConfig, curvature_batch: int, device_mesh: Mesh) -> None:
    """Tells the user of batches that cannot be cut as asked."""
    if config.attention == "cudnn" and device_mesh.devices.flat[0].platform != "gpu":
        raise UsageError("--attention cudnn needs an NVIDIA GPU. Leave it out.")
    if config.batch_size % jax.process_count():
        raise UsageError(
            f"--batch-size {config.batch_size} does not divide over {jax.process_count()} "
            "processes. Choose a multiple."
        )
    shards = batch_shards(device_mesh)
    for what, size, parts in (
        (
            f"--batch-size {config.batch_size} over --accumulate {config.accumulate}",
            config.batch_size,
            config.accumulate * shards,
        ),
        (f"--curvature-batch {curvature_batch}", curvature_batch, shards),
    ):
        if size < 1 or size % parts:
            raise UsageError(
                f"{what} does not divide over {shards} device(s). Choose a multiple of {parts}."
            )
    if config.batch_size % curvature_batch:
        raise UsageError(
            f"--curvature-batch {curvature_batch} does not divide --batch-size "
            f"{config.batch_size}. Choose a divisor."
        )
