"""Whether one target for the win rate serves where γ would have to be tuned anew.

    python -m benchmarks.self_tuning_gamma [--quick]

For each of two model sizes and four batch sizes, γ is tuned on a ladder, on the `tune` split. Then
the best γ of that cell and each of three targets run at the same learning rate on other seeds, and
are judged on the `validation` split: γ is tuned for every cell, the targets for none. Runs are kept
as those of `lm_race` are; `results/self_tuning_gamma_sophia_g.json` and `.png` hold the table and
the plot.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro

from benchmarks.entrants import ENTRANTS, search
from benchmarks.journal import Journal, Runs
from benchmarks.provenance import RESULTS, provenance
from benchmarks.runner import Runner, Setting
from examples.lm import data
from examples.lm.config import MODELS

WIDTHS = (32, 64)
BATCHES = (2, 8, 16, 32)  # sequences of 128 bytes
TARGETS = (0.3, 0.5, 0.7)
TUNING_SEED = 1000


@dataclass(frozen=True)
class GammaConfig:
    """What to compare.

    Attributes:
      optimizer: sophia_g or sophia_h.
      steps: of every run.
      learning_rate: of every run.
      b1: of every run.
      warmup: of every run.
      tries: values of γ that may be tried for each cell.
      seeds: of the runs that are reported; tuning uses another.
      quick: one cell and a few steps, to see that it runs; writes no results.
      runs: the file of finished runs.
    """

    optimizer: str = "sophia_g"
    steps: int = 300
    learning_rate: float = 6e-3
    b1: float = 0.8
    warmup: float = 0.2
    tries: int = 6
    seeds: tuple[int, ...] = (0, 1, 2)
    quick: bool = False
    runs: Path = RESULTS / "self_tuning_gamma.jsonl"


def cell(
    config: GammaConfig, journal: Journal, corpus: data.Corpus, width: int, batch: int
) -> dict[str, Any]:
    """One model and batch size: the losses of the best fixed γ and of every target."""
    entrant = ENTRANTS[config.optimizer]
    model = replace(MODELS["tiny"], width=width)
    setting = Setting(model=model, batch_size=batch, curvature_batch=max(1, batch // 2))
    common = {name: getattr(config, name) for name in ("learning_rate", "b1", "warmup")}
    shape = {"optimizer": config.optimizer, "width": str(width), "batch": str(batch)}

    def runs(kind: str, **fixed: float | None) -> Runs:
        row = replace(entrant.row, tiny=replace(entrant.row.tiny, **common, **fixed))
        return Runs(journal, corpus, lambda: Runner(row, setting), kind=kind, **shape)

    by_gamma = runs("gamma")
    ladder = replace(entrant, grid={"gamma": (0.1, 0.5)}, order=("gamma",))
    found = search(
        ladder,
        config.tries,
        lambda p: by_gamma({**common, **p}, config.steps, TUNING_SEED, "tune")["loss"],
    )
    by_target = runs("target", win_rate=0.3)
    points = {"best gamma": (by_gamma, {**common, **found["point"]})}
    for target in TARGETS:
        points[f"target {target}"] = (by_target, {**common, "win_rate": target})
    rows = {}
    for name, (group, point) in points.items():
        raced = [group(point, config.steps, seed, "validation") for seed in config.seeds]
        rows[name] = {
            "point": point,
            "losses": [row["loss"] for row in raced],
            "win_rate": float(np.mean([np.mean(row["win_rates"]) for row in raced])),
            "gamma": float(np.exp(np.mean([np.log(row["gammas"][-1]) for row in raced]))),
        }
    return {"width": width, "batch": batch, "tokens": setting.tokens, "open": found["open"], **rows}


def plot(cells: list[dict[str, Any]], path: Path) -> None:
    """The loss of each target relative to the best fixed γ, and that γ, by batch size."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for width, style in zip(WIDTHS, ("--", "-"), strict=True):
        own = [c for c in cells if c["width"] == width]
        tokens = [c["tokens"] for c in own]
        for index, target in enumerate(TARGETS):
            ratios = [
                np.array(c[f"target {target}"]["losses"]) / np.mean(c["best gamma"]["losses"])
                for c in own
            ]
            means = [100 * (r.mean() - 1) for r in ratios]
            spread = [
                [100 * (m / 100 + 1 - r.min()) for m, r in zip(means, ratios, strict=True)],
                [100 * (r.max() - 1 - m / 100) for m, r in zip(means, ratios, strict=True)],
            ]
            label = f"target {target}, width {width}"
            left.errorbar(
                tokens, means, spread, color=f"C{index}", ls=style, label=label, capsize=2
            )
        gammas = [c["best gamma"]["point"]["gamma"] for c in own]
        right.plot(tokens, gammas, "k" + style, label=f"best fixed, width {width}")
        for index, target in enumerate(TARGETS):
            found = [c[f"target {target}"]["gamma"] for c in own]
            right.plot(tokens, found, color=f"C{index}", ls=style)
    left.axhspan(-1, 1, color="gray", alpha=0.15, linewidth=0)
    left.set(xscale="log", xlabel="tokens a batch", ylabel="loss over best fixed γ's (%)")
    right.set(
        xscale="log", yscale="log", xlabel="tokens a batch", ylabel="γ (targets': at the end)"
    )
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main(config: GammaConfig) -> None:
    """Runs what is missing and writes the tables and the plot."""
    if config.quick:
        config = replace(config, steps=10, tries=2, seeds=(0,))
    origin = provenance("benchmarks.self_tuning_gamma")
    journal = Journal(None if config.quick else config.runs)
    corpus = data.load("stdlib")
    shapes = [(w, b) for b in BATCHES for w in WIDTHS][: 1 if config.quick else None]
    cells = [cell(config, journal, corpus, width, batch) for width, batch in shapes]
    if config.quick:
        return
    stem = f"self_tuning_gamma_{config.optimizer}"
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(config).items()}
    result = {**origin, "settings": settings, "cells": cells}
    (RESULTS / f"{stem}.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(cells, RESULTS / f"{stem}.png")


if __name__ == "__main__":
    main(tyro.cli(GammaConfig))
