"""What plots of several experiments have in common."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def line_over_seeds(axes: Any, x: Sequence[float], losses: Any, label: str) -> None:
    """Draws the mean over seeds, and the range of the seeds around it.

    Args:
      axes: matplotlib's.
      x: where the points lie.
      losses: for each point, that of each seed.
      label: the name in the legend.
    """
    losses = np.array(losses, float)
    (line,) = axes.plot(x, losses.mean(axis=1), marker="o", ms=4, label=label)
    bounds = losses.min(axis=1), losses.max(axis=1)
    axes.fill_between(x, *bounds, color=line.get_color(), alpha=0.15)
