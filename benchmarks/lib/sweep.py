"""Sweeps of the trainer of `examples.lm`: many runs of one optimizer that share one compilation."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from benchmarks.lib.journal import Journal
from examples.lm.config import MODELS, ModelConfig, TrainConfig
from examples.lm.data import Corpus
from examples.lm.loop import Result
from examples.lm.optimizers import OPTIMIZERS, Optimizer
from examples.lm.run import Run, resolve
from examples.lm.train import Trainer
from examples.lm.tune import Point, Sweep

TUNING_SEED = 1000  # of the runs that choose hyperparameters; no reported run has it
EVALUATED = 512  # windows that a loss is the mean over
LOGGED = ("step", "loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu")


@dataclass(frozen=True)
class Workload:
    """The model and the batches that compared runs have in common.

    Attributes:
      model: the transformer.
      batch_size: sequences in a step.
      curvature_batch: sequences in a curvature estimate.
      update_interval: steps from one estimate to the next.
      vocab_size: different tokens of the text; 256 bytes by default.
    """

    model: ModelConfig = field(default_factory=lambda: MODELS["tiny"])
    batch_size: int = 8
    curvature_batch: int = 4
    update_interval: int = 10
    vocab_size: int = 256

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.batch_size * self.model.context

    def run(self, row: Optimizer | str) -> Run:
        """A run of one optimizer on one device, logged at every step."""
        row = OPTIMIZERS[row] if isinstance(row, str) else row
        config = TrainConfig(
            batch_size=self.batch_size,
            curvature_batch=self.curvature_batch,
            refresh="host",
            eval_batches=EVALUATED // self.batch_size,
            log_interval=1,
        )
        h = dataclasses.replace(row.tiny, update_interval=self.update_interval)
        run = resolve(config, row, jax.devices()[:1])
        run = dataclasses.replace(run, hyperparameters=h, model=self.model)
        return run.with_vocabulary(self.vocab_size)


def compiled(run: Run) -> Trainer:
    """The trainer of a sweep. Its layers are few: without a loop over them a step is faster."""
    return Trainer(run, traced=True, unroll=True)


@dataclass(frozen=True)
class Outcome:
    """One run.

    Attributes:
      loss: on the held-out split after the last step, nats a token; NaN if the run diverged.
      seconds: of all steps, compilation and validation left out.
      win_rates: at each refresh, for a Sophia.
      gammas: at each refresh, for a Sophia.
      training: the mean training loss of each twentieth of the run.
      device: that of the run, as JAX names it.
      more: what else a trainer reports, at each refresh.
    """

    loss: float
    seconds: float
    win_rates: list[float]
    gammas: list[float]
    training: list[float]
    device: str
    more: dict[str, list[float]] = field(default_factory=dict)


def outcome(result: Result, trainer: Trainer) -> Outcome:
    """What the journal keeps of a run that logged every step."""
    lines = [line for line in result.records if "loss" in line]
    refreshes = [line for line in lines if trainer.refreshes_at(int(line["step"]))]
    watched = {
        name: [line[name] for line in refreshes]
        for name in (refreshes[0] if refreshes else {})
        if name not in LOGGED
    }
    losses = np.array([line["loss"] for line in lines])
    return Outcome(
        loss=result.validation_loss,
        seconds=result.step_seconds * result.steps,
        win_rates=watched.pop("win_rate", []),
        gammas=watched.pop("gamma", []),
        training=[float(part.mean()) for part in np.array_split(losses, min(20, len(losses)))],
        device=trainer.run.mesh.devices.flat[0].device_kind,
        more=watched,
    )


def mean_win_rate(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The mean win rate of runs' lines in the journal; None for optimizers that have none."""
    rates = [np.mean(row["win_rates"]) for row in rows if row["win_rates"]]
    return float(np.mean(rates)) if rates else None


class Runs:
    """The runs of one optimizer on one workload, each made once and then read from the journal.

    Args:
      journal: of the experiment.
      corpus: the text.
      run: what the runs have in common.
      make: compiles the trainer, when the first run is missing.
      **names: what tells these runs from the journal's others.
    """

    def __init__(
        self,
        journal: Journal,
        corpus: Corpus,
        run: Run,
        make: Callable[[Run], Trainer] = compiled,
        **names: str,
    ):
        self.journal, self.names = journal, names
        self.sweep = Sweep(run, corpus, make)

    def __call__(self, point: Point, steps: int, seed: int, split: str) -> dict[str, Any]:
        """The run at a point: "tune" is the split for tuning, "validation" that for tables."""
        key = {**self.names, "steps": steps, "seed": seed, "split": split, **point}

        def train() -> dict[str, Any]:
            result = self.sweep(point, steps, seed, split)
            assert self.sweep.trainer is not None
            return dataclasses.asdict(outcome(result, self.sweep.trainer))

        return self.journal.get(key, train)
