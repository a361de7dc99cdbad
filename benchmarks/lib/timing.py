"""Times of several optimizers, measured in turns, as ratios to AdamW's in the same round."""

import statistics
from collections.abc import Callable
from typing import Any

from examples.lm import timing
from examples.lm.data import Corpus
from examples.lm.train import Trainer


def over_adamw(measures: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, Any]]:
    """Each optimizer's seconds, and the median of their ratio to AdamW's, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds + 1):
        for name, measure in measures.items():
            taken = measure()
            if number:
                seconds[name].append(taken)
    return {
        name: {
            "seconds": of_rounds,
            "over_adamw": statistics.median(
                own / adamw for own, adamw in zip(of_rounds, seconds["adamw"], strict=True)
            ),
        }
        for name, of_rounds in seconds.items()
    }


def mean_step(trainer: Trainer, corpus: Corpus) -> Callable[[], float]:
    """A function that trains for one interval and returns the seconds of an average step."""
    return lambda: statistics.mean(timing.turn(trainer, corpus)[0])
