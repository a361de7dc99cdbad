"""The loss curves as a picture."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from sophia_optax import plotting

from . import run_folder

Records = list[dict[str, float]]


def losses(runs: dict[str, Records], path: Path, reference: float | None = None) -> None:
    """Draws training (faint, smoothed) and validation losses by step, a colour for each run.

    All of every curve is on the left, on a log scale; on the right is the second half of
    the validation losses.
    """
    figure, (whole, end) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    points: list[tuple[float, float]] = []
    for index, (name, records) in enumerate(runs.items()):
        training, validation = (finite(records, key) for key in ("loss", "val_loss"))
        color = f"C{index}"
        if training:
            steps, values = np.array(training).T
            whole.plot(steps, smoothed(values), color=color, alpha=0.3, linewidth=1)
        if validation:
            steps, values = np.array(validation).T
            label = f"{name}: {values[-1]:.3f}"
            for axes in (whole, end):
                axes.plot(steps, values, color=color, marker="o", markersize=3, label=label)
        points += validation
    if reference is not None:
        label = f"bigram counts: {reference:.3f}"
        whole.axhline(reference, color="gray", linestyle=":", label=label)
    whole.set(yscale="log", ylabel="loss (nats a token)", title="validation loss (training: faint)")
    for axis in (whole.yaxis.set_major_formatter, whole.yaxis.set_minor_formatter):
        axis(ScalarFormatter())
    right = whole.get_xlim()[1]
    left = 0.45 * right  # a run of half of the steps ends within the picture
    end.set(xlim=(left, right), title="validation loss, second half")
    shown = [value for step, value in points if step >= left]
    if shown:
        room = 0.1 * (max(shown) - min(shown)) + 0.01
        end.set_ylim(min(shown) - room, max(shown) + room)
    for axes in (whole, end):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    if whole.get_legend_handles_labels()[0]:
        whole.legend()
    save(figure, path)
    plt.close(figure)


def curvature(runs: dict[str, Records], folder: Path) -> None:
    """Draws win_rate.png and gamma.png, if they change during a run."""
    for draw in (plotting.win_rate, plotting.gamma):
        name = draw.__name__
        if any(len({r[name] for r in records if name in r}) > 1 for records in runs.values()):
            save(draw(runs), folder / f"{name}.png")


def finite(records: Records, key: str) -> list[tuple[float, float]]:
    """A curve's points by step, up to where it is no longer finite."""
    return [(r["step"], r[key]) for r in records if key in r and np.isfinite(r[key])]


def save(figure: Figure, path: Path) -> None:
    """Writes the picture, whole or not at all."""
    run_folder.replace(path, lambda unfinished: figure.savefig(unfinished, dpi=150))


def smoothed(values: np.ndarray, width: int = 5) -> np.ndarray:
    """A moving average that keeps the length."""
    width = min(width, len(values))
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")
