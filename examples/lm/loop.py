"""The loop around the training step: batches in, metrics, validations and checkpoints out."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from . import data, flops, hosts, mesh
from .run import Run
from .timing import StepClock
from .train import Metrics, Trainer, TrainState


@dataclass
class Result:
    """What a run leaves behind.

    Attributes:
      records: the lines of metrics.jsonl, in order.
      seconds: of each step, those that compile left out.
      refreshed: whether each of those steps estimated the curvature.
      validation_loss: after the last step, nats a token.
      steps: how many steps the state has behind it.
      peak_bytes: the most memory that this process's first device has held, where it counts.
      diverged: the step whose loss or gradient was not finite, if there was one.
    """

    records: list[dict[str, float]]
    seconds: list[float]
    refreshed: list[bool]
    validation_loss: float
    steps: int = 0
    peak_bytes: int | None = None
    diverged: int | None = None

    @property
    def step_seconds(self) -> float:
        """Of an average step, curvature included; a machine's hiccups count a little only."""
        plain, refresh = self._medians()
        share = np.mean(self.refreshed) if self.refreshed else 0.0
        return float((1 - share) * plain + share * refresh)

    @property
    def curvature_share(self) -> float:
        """The share of the time that went into estimating curvature."""
        plain, _ = self._medians()
        return max(0.0, 1 - plain / self.step_seconds) if any(self.refreshed) else 0.0

    @property
    def win_rate(self) -> float | None:
        """The share of coordinates that were not clipped, averaged over the run."""
        rates = [r["win_rate"] for r in self.records if "win_rate" in r]
        return float(np.mean(rates)) if rates else None

    def _medians(self) -> tuple[float, float]:
        seconds, refreshed = np.array(self.seconds), np.array(self.refreshed, bool)
        plain = float(np.median(seconds[~refreshed])) if (~refreshed).any() else 0.0
        return plain, float(np.median(seconds[refreshed])) if refreshed.any() else plain


class Profile(Protocol):
    """What records some of the steps: `report.Profiler`, or nothing."""

    def turns(self, taken: int) -> bool:
        """Whether it starts or ends once this process has taken that many steps."""
        ...

    def before(self, taken: int) -> None:
        """Called before each step, with the number that this process has taken."""
        ...


class Store(Protocol):
    """Where a run is kept: `checkpoint.Checkpoints`, or nowhere."""

    def save(self, step: int, state: TrainState, batches: Any) -> None:
        """Keeps the state after `step` steps."""
        ...

    def check(self) -> None:
        """Tells of a save that has failed since."""
        ...

    def restore(self, abstract_state: TrainState) -> tuple[int, TrainState, Any] | None:
        """Returns what was kept last, if anything was."""
        ...


def fit(
    run: Run,
    corpus: data.Corpus,
    *,
    split: str = "validation",
    trainer: Trainer | None = None,
    log: Callable[[dict[str, float]], None] = lambda record: None,
    store: Store | None = None,
    stop: Callable[[int], bool] | None = None,
    profile: Profile | None = None,
) -> Result:
    """Trains one model and validates it on the way.

    Args:
      run: what to train.
      corpus: its text.
      split: the part of the corpus to validate on.
      trainer: the run's compiled functions; compiled here if left out.
      log: called with each line of metrics, a step late, so that the device never waits.
      store: where the state is saved to, and resumed from with `--resume`.
      stop: asked after each step, with the number of steps so far; once true, the state is saved
        and the run ends.
      profile: asked before each step.

    Returns:
      Losses and times.
    """
    config, context = run.config, run.model.context
    trainer = trainer or Trainer(run)
    batches = data.training_batches(
        corpus,
        context,
        config.batch_size,
        config.seed,
        jax.process_index(),
        jax.process_count(),
    )
    rows = mesh.local_rows(config.batch_size)
    held_out = data.evaluation(
        getattr(corpus, split), context, config.batch_size, config.eval_batches
    )
    held_out = [mesh.global_batch(batch[rows], run.mesh) for batch in held_out]

    kept = store.restore(trainer.abstract_sharded_state()) if store and config.resume else None
    if kept:
        start, state, position = kept
        batches.set_state(hosts.own_position(position))
    else:
        start, state = 0, trainer.init(config.seed)
    result = Result([], [], [], float("nan"), start)

    def record(line: dict[str, float]) -> None:
        result.records.append(line)
        log(line)

    def held_out_loss(state: TrainState) -> float:
        losses = [trainer.evaluate(state.params, batch) for batch in held_out]
        return float(np.mean(jax.device_get(losses)))

    def diverge(step: int, what: str) -> None:
        if result.diverged is None:
            result.diverged, result.validation_loss = step, math.nan
            hosts.warn(
                f"{config.optimizer} diverged: {what} at step {step}. Try a lower --learning-rate, "
                "a longer --warmup or a smaller --clip-norm, with another --out."
            )

    def report(step: int, metrics: Metrics, ended: float | None = None) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        program = trainer.program_at(step)
        seconds = clock.end(ended, counts=program in compiled)
        if program in compiled:
            result.seconds.append(seconds)
            result.refreshed.append(trainer.refreshes_at(step))
        compiled.add(program)
        finite = all(math.isfinite(values[name]) for name in ("loss", "grad_norm"))
        if not finite:
            diverge(
                step,
                f"the loss is {values['loss']:.3g} and the gradient's norm "
                f"{values['grad_norm']:.3g}",
            )
        if step % config.log_interval == 0 or step in (config.steps - 1, result.diverged):
            record({"step": step, **values, **speed()})

    def speed() -> dict[str, float]:
        """Of the steps since the last line."""
        steps = clock.speed()
        if steps is None:
            return {}
        tokens = steps * config.batch_size * context
        share = flops.utilization(run.model, tokens, list(run.mesh.devices.flat))
        return {"tokens_per_second": tokens} | ({} if share is None else {"mfu": share})

    def failed() -> bool:
        return config.stop_on_nan and result.diverged is not None

    late: Metrics | None = None
    compiled: set[bool | None] = set()
    clock = StepClock()
    for step in range(start, config.steps):
        if profile:
            profile.before(step - start)
        if late is None:
            clock.restart()
        began = clock.now()
        batch = mesh.global_batch(next(batches), run.mesh)
        if step == start:
            trainer.compile_with_the_others(state, batch)
        device_waited = late is not None and late["loss"].is_ready()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics = trainer.step(state, batch, step)
        if late is not None:
            report(step - 1, late, began if device_waited else None)
        late, result.steps = metrics, step + 1
        if failed():
            break
        done, stopping = step + 1, stop is not None and stop(step + 1)
        at_end = done == config.steps or stopping
        validating = done % config.eval_interval == 0 or done == config.steps
        saving = store and (done % config.save_interval == 0 or at_end)
        if store:
            store.check()
        if validating or saving or at_end or (profile and profile.turns(done - start)):
            report(step, late)
            late = None
            if validating and not failed() and (not stopping or done == config.steps):
                result.validation_loss = held_out_loss(state)
                record({"step": done, "val_loss": result.validation_loss})
                if not math.isfinite(result.validation_loss):
                    diverge(step, f"the validation loss is {result.validation_loss}")
            if failed():
                break
            if store and saving:
                store.save(done, state, hosts.gather(batches.get_state()))
        if stopping:
            break
    if start == config.steps:  # stopped before, after its last step
        result.validation_loss = held_out_loss(state)
    statistics = jax.local_devices()[0].memory_stats() or {}
    result.peak_bytes = statistics.get("peak_bytes_in_use")
    return result
