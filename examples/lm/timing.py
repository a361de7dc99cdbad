"""Step times of several optimizers, measured in turns, so that a slow moment counts for all."""

import time

import jax

from . import data, mesh
from .train import Trainer

Times = tuple[list[float], list[bool]]


def in_turns(trainers: dict[str, Trainer], corpus: data.Corpus) -> dict[str, Times]:
    """For each optimizer, seconds of steps, and whether each of these estimated the curvature.

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
