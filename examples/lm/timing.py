"""How long steps take: in a run, and of several optimizers in turns."""

import time

import jax

from . import data, mesh
from .train import Trainer

Times = tuple[list[float], list[bool]]


class StepClock:
    """Seconds from the end of one step to the end of the next, without what the loop does between.

    A run reads the metrics of a step after it has started the next one. If the run has to wait for
    them, the step ends when they arrive. If they are there already, the device was waiting for the
    host, and the step ends where the host begins the next one: the pace is the host's.
    """

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0
        self.restart()

    def now(self) -> float:
        """The time, for `end`."""
        return time.perf_counter()

    def restart(self) -> None:
        """Starts from now, after a validation or a save."""
        self.ended = self.now()

    def end(self, at: float | None = None, *, counts: bool = True) -> float:
        """Ends a step, now or earlier.

        Args:
          at: when it ended.
          counts: whether `speed` takes it into account.

        Returns:
          How long it took.
        """
        before, self.ended = self.ended, self.now() if at is None else at
        if counts:
            self.steps, self.seconds = self.steps + 1, self.seconds + self.ended - before
        return self.ended - before

    def speed(self) -> float | None:
        """Steps a second, over those that ended since this was called last; None without one."""
        steps, seconds = self.steps, self.seconds
        self.steps, self.seconds = 0, 0.0
        return steps / seconds if seconds > 0 else None


def in_turns(trainers: dict[str, Trainer], corpus: data.Corpus) -> dict[str, Times]:
    """For each optimizer, seconds of steps, and whether each of these estimated the curvature.

    The optimizers take turns, so that a slow moment of the machine counts for all.

    A turn is the steps from one estimate to the next, from new params. There is about one turn for
    each 300 steps of the run, at least one and at most five.
    """
    found: dict[str, Times] = {name: ([], []) for name in trainers}
    steps = next(iter(trainers.values())).run.config.steps
    for _ in range(min(max(steps // 300, 1), 5)):
        for name, trainer in trainers.items():
            for taken, times in zip(found[name], turn(trainer, corpus), strict=True):
                taken.extend(times)
    return found


def turn(trainer: Trainer, corpus: data.Corpus) -> Times:
    """Steps that are timed one by one, but for the first."""
    run = trainer.run
    size = run.config.batch_size
    window = data.evaluation(corpus.train, run.model.context, size, 1)[0]
    batch = mesh.global_batch(window[mesh.local_rows(size)], run.mesh)
    state = trainer.init(run.config.seed)
    seconds, refreshed = [], []
    for step in range(run.hyperparameters.update_interval + 1):
        jax.block_until_ready(state.params)
        started = time.perf_counter()
        state, metrics = trainer.step(state, batch, step)
        jax.block_until_ready((state.params, metrics))
        if step > 0:
            seconds.append(time.perf_counter() - started)
            refreshed.append(trainer.refreshes_at(step))
    return seconds, refreshed
