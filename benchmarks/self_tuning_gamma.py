"""Whether one target for the win rate serves where γ would have to be tuned anew.

    python -m benchmarks.self_tuning_gamma [--quick]

For each of two model sizes and four batch sizes, γ is tuned on a ladder, on the `tune` split. Then
the best γ of that cell and each of the targets run at the same learning rate on other seeds, and
are judged on the `validation` split: γ is tuned for every cell, the targets for none. A target is
met by one γ for all params or, with "per tensor", by one for each parameter. Runs are kept as those
of `lm_race` are; `results/self_tuning_gamma_sophia_g.json` and `.png` hold the table and the plot.
"""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro

import sophia_optax
from benchmarks.entrants import ENTRANTS
from benchmarks.lib.journal import Journal
from benchmarks.lib.provenance import RESULTS, provenance
from benchmarks.lib.sweep import TUNING_SEED, Runs, Workload, mean_win_rate
from benchmarks.lm_race import QUICK
from examples.lm import data
from examples.lm.config import MODELS
from examples.lm.tune import search

WIDTHS = (32, 64)
BATCHES = (2, 8, 16, 32)  # sequences of 128 bytes


@dataclass(frozen=True)
class GammaConfig:
    """What to compare.

    Attributes:
      optimizer: a Sophia in `ENTRANTS`.
      steps: of every run.
      learning_rate: of every run.
      b1: of every run.
      warmup: of every run.
      targets: for the win rate of all params together.
      per_tensor: targets for that of each parameter.
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
    targets: tuple[float, ...] = (0.3, 0.5, 0.7)
    per_tensor: tuple[float, ...] = (0.5, 0.7)
    tries: int = 6
    seeds: tuple[int, ...] = (0, 1, 2)
    quick: bool = False
    runs: Path = RESULTS / "self_tuning_gamma.jsonl"


def cell(
    config: GammaConfig, journal: Journal, corpus: data.Corpus, width: int, batch: int
) -> dict[str, Any]:
    """One model and batch size: the losses of the best fixed γ and of every target."""
    entrant = ENTRANTS[config.optimizer]
    model = replace(QUICK.workload.model if config.quick else MODELS["tiny"], width=width)
    workload = Workload(model=model, batch_size=batch, curvature_batch=max(1, batch // 2))
    common = {name: getattr(config, name) for name in ("learning_rate", "b1", "warmup")}
    names = {"optimizer": config.optimizer, "width": str(width), "batch": str(batch)}

    def runs(kind: str, **fixed: float | None) -> Runs:
        row = replace(entrant, tiny=replace(entrant.tiny, **common, **fixed))
        if kind != "gamma":
            per_tensor = kind == "target per tensor"
            target = functools.partial(sophia_optax.win_rate_target, per_tensor=per_tensor)
            row = replace(row, build=functools.partial(row.build, target=target))
        return Runs(journal, corpus, workload.run(row), kind=kind, **names)

    by_gamma = runs("gamma")
    found = search(
        {"gamma": (0.1, 0.5)},
        config.tries,
        lambda p: by_gamma({**common, **p}, config.steps, TUNING_SEED, "tune")["loss"],
    )
    points = {"best gamma": (by_gamma, {**common, **found["point"]})}
    for kind, targets in {"target": config.targets, "target per tensor": config.per_tensor}.items():
        by_target = runs(kind, win_rate=0.5)
        for target in targets:
            points[f"{kind} {target}"] = (by_target, {**common, "win_rate": target})
    rows = {}
    for name, (group, point) in points.items():
        raced = [group(point, config.steps, seed, "validation") for seed in config.seeds]
        rows[name] = {
            "point": point,
            "losses": [row["loss"] for row in raced],
            "win_rate": mean_win_rate(raced),
            "gamma": float(np.exp(np.mean([np.log(row["gammas"][-1]) for row in raced]))),
        }
    best = np.mean(rows["best gamma"]["losses"])
    for row in rows.values():
        row["over_best"] = float(np.mean(row["losses"]) / best)
    return {
        "width": width,
        "batch": batch,
        "tokens": workload.tokens,
        "open": found["open"],
        **rows,
    }


def plot(cells: list[dict[str, Any]], path: Path) -> None:
    """The loss of each target relative to the best fixed γ, and that γ, by batch size."""
    figure, (losses, gammas) = plt.subplots(
        2, len(WIDTHS), figsize=(11, 7.5), layout="constrained", sharex=True, sharey="row"
    )
    targets = [name for name in cells[0] if name.startswith("target")]
    shades = plt.colormaps["viridis"](np.linspace(0, 0.9, len(targets)))
    colours = dict(zip(targets, shades, strict=True))
    for column, width in enumerate(WIDTHS):
        own = [c for c in cells if c["width"] == width]
        tokens = np.array([c["tokens"] for c in own])
        best = [np.array(c["best gamma"]["losses"]) for c in own]
        # Where seeds end on either side of a plateau their spread is what it is: shown, not hidden.
        spread = np.array([100 * (b.max() - b.min()) / 2 / b.mean() for b in best])
        losses[column].fill_between(
            tokens, -spread, spread, color="gray", alpha=0.2, label="spread of the best fixed γ"
        )
        losses[column].axhline(0, color="black", lw=0.8)
        gammas[column].plot(
            tokens, [c["best gamma"]["point"]["gamma"] for c in own], "ko-", label="best fixed γ"
        )
        for index, name in enumerate(targets):
            means = [c[name]["over_best"] for c in own]
            style = "s--" if "tensor" in name else "o-"
            losses[column].plot(
                tokens * 1.04 ** (index - 2),
                100 * (np.array(means) - 1),
                style,
                color=colours[name],
                label=name,
            )
            gammas[column].plot(
                tokens, [c[name]["gamma"] for c in own], style, color=colours[name], label=name
            )
        losses[column].set(title=f"width {width}")
        gammas[column].set(xscale="log", yscale="log", xlabel="tokens a batch")
        gammas[column].set_xticks(tokens, [str(n) for n in tokens])
        gammas[column].xaxis.minorticks_off()
    losses[0].set(ylabel="loss over that of the best fixed γ (%)")
    gammas[0].set(ylabel="γ; black: the best fixed, others: at the end of the run")
    figure.legend(*losses[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
