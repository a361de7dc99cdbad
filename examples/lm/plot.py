"""The loss curves as a picture."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from sophia_optax import plotting

from . import run_folder

Records = list[dict[str, float]]


def losses(runs: dict[str, Records], path: Path, reference: float | None = None) -> None:
    """Draws training (faint, smoothed) and validation losses by step, a colour for each run."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    last = []
    for index, (name, records) in enumerate(runs.items()):
        color = f"C{index}"
        training, validation = (finite(records, key) for key in ("loss", "val_loss"))
        if training:
            steps, values = np.array(training).T
            axes.plot(steps, smoothed(values), color=color, alpha=0.3, linewidth=1)
        if validation:
            steps, values = np.array(validation).T
            label = f"{name}: {values[-1]:.3f}"
            axes.plot(steps, values, color=color, marker="o", markersize=3, label=label)
            last.append(values[-1])
    if reference is not None:
        axes.axhline(
            reference, color="gray", linestyle=":", label=f"bigram counts: {reference:.3f}"
        )
    if last:
        shown = [*last, *([] if reference is None else [reference])]
        low, high = min(shown), max(shown)
        axes.set_ylim(low - 0.1, high + 0.6 * (high - low) + 0.3)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="validation loss (training: faint)")
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    save(figure, path)
    plt.close(figure)


def curvature(runs: dict[str, Records], folder: Path) -> None:
    """Draws win_rate.png and gamma.png, if a run has them."""
    for draw in (plotting.win_rate, plotting.gamma):
        name = draw.__name__
        if any(name in record for records in runs.values() for record in records):
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
