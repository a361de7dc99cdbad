"""Memory: what the state takes, and one sentence where a device or the host has too little."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax

from .config import UsageError
from .train import Trainer

GIB = 2**30

TRAINING = (
    "Try a smaller --batch-size, a larger --accumulate, --remat, a smaller model, or more devices "
    "with a larger --mesh.fsdp, with another --out. Checkpoints are kept: --resume takes --remat "
    "and another --mesh. `plan` shows beforehand what a step needs."
)
SAMPLING = "Sample on a device with more memory; the checkpoints are as they were."


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out: the host's, or a device's.

    XLA's have the code RESOURCE_EXHAUSTED, but for a CPU's while a step is running.
    """
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    return isinstance(error, jax.errors.JaxRuntimeError) and (
        "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
    )


def shard_bytes(tree: Any) -> int:
    """What one device holds of a tree of shapes."""
    shards = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree))
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shards)


@contextlib.contextmanager
def enough(trainer: Trainer, remedy: str = TRAINING) -> Iterator[None]:
    """Turns running out of memory into a sentence of what needs it.

    Args:
      trainer: of the run whose state is made, restored or stepped inside.
      remedy: what the user may do.

    Raises:
      UsageError: memory ran out.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not ran_out(error):
            raise
        state, config = trainer.abstract_sharded_state(), trainer.run.config
        count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise UsageError(
            f"{config.model} with {config.optimizer} does not fit in memory ({reason}): its "
            f"{count:,} parameters and the optimizer's state take {shard_bytes(state):,} bytes a "
            f"device, and a step of --batch-size {config.batch_size} takes more. {remedy}"
        ) from error
