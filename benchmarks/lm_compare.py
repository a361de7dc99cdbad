"""The comparison of `examples.lm` on several seeds: one table, one plot.

    python -m benchmarks.lm_compare [--quick]

Each seed is one `python -m examples.lm compare`. One that was interrupted goes on, and one whose
summary is there is not run again. Writes `benchmarks/results/lm_compare.json` and `.png`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro

from benchmarks.lib.provenance import RESULTS, provenance

SEEDS = (0, 1, 2)
QUICK = ["--steps", "20", "--optimizers", "adamw", "sophia_g", "--half", "adamw"]


def run(folder: Path, seed: int, options: list[str]) -> tuple[Any, list[dict[str, Any]]]:
    """One comparison's summary and metrics.

    Args:
      folder: of the comparison. What it has of an earlier call is used.
      seed: of the comparison.
      options: of the comparison.
    """
    if not (folder / "summary.json").exists():
        started = (folder / "run.json").exists()
        arguments = ["--resume"] if started else ["--seed", str(seed), *options]
        command = [sys.executable, "-m", "examples.lm", "compare", "--out", str(folder), *arguments]
        subprocess.run(command, check=True)
    metrics = (folder / "metrics.jsonl").read_text().splitlines()
    return json.loads((folder / "summary.json").read_text()), [json.loads(m) for m in metrics]


def table(summaries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each optimizer's figures over the seeds; step times as ratios to AdamW's in the same run."""
    out = {}
    for name in summaries[0]["runs"]:
        runs = [summary["runs"][name] for summary in summaries]
        ratios = [
            summary["runs"][name]["step_seconds"] / summary["runs"]["adamw"]["step_seconds"]
            for summary in summaries
        ]
        losses = [r["validation_loss"] for r in runs]
        win_rates = [r["win_rate"] for r in runs if r["win_rate"] is not None]
        out[name] = {
            "steps": runs[0]["steps"],
            "validation_loss": losses,
            "validation_loss_mean": float(np.mean(losses)),
            "step_time_over_adamw": float(np.median(ratios)),
            "curvature_share": float(np.median([r["curvature_share"] for r in runs])),
            "win_rate": float(np.mean(win_rates)) if win_rates else None,
        }
    return out


def plot(metrics: list[list[dict[str, Any]]], bigram_loss: float, path: Path) -> None:
    """Validation losses by step: the mean over the seeds, and from the least to the largest."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    names = dict.fromkeys(m["run"] for m in metrics[0])
    last = []
    for index, name in enumerate(names):
        lines = [m for run in metrics for m in run if m["run"] == name and "val_loss" in m]
        steps = sorted({m["step"] for m in lines})
        losses = np.array([[m["val_loss"] for m in lines if m["step"] == s] for s in steps])
        mean = losses.mean(axis=1)
        axes.plot(steps, mean, color=f"C{index}", label=f"{name}: {mean[-1]:.3f}")
        axes.fill_between(
            steps, losses.min(axis=1), losses.max(axis=1), color=f"C{index}", alpha=0.2, linewidth=0
        )
        last.append(mean[-1])
    axes.axhline(bigram_loss, color="gray", ls=":", label=f"bigram counts: {bigram_loss:.3f}")
    axes.set_ylim(min(last) - 0.1, bigram_loss + 0.5)
    axes.set(
        xlabel="step",
        ylabel="validation loss (nats a byte)",
        title=f"{len(metrics)} seeds: mean, least and largest",
    )
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(quick: bool = False) -> None:
    """Runs what is missing and writes the results.

    Args:
      quick: a few steps, written to runs/.
    """
    origin = provenance("benchmarks.lm_compare")
    if quick:
        seeds, results = SEEDS[:1], Path("runs")
        shutil.rmtree("runs/quick", ignore_errors=True)
        found = [run(Path("runs/quick"), seed, QUICK) for seed in seeds]
    else:
        seeds, results = SEEDS, RESULTS
        found = [run(Path(f"runs/seed-{seed}"), seed, []) for seed in seeds]
    summaries, metrics = zip(*found, strict=True)
    bigram_loss = summaries[0]["bigram_loss"]
    result = {
        **origin,
        "seeds": seeds,
        "bigram_loss": bigram_loss,
        "hyperparameters": summaries[0]["hyperparameters"],
        "optimizers": table(list(summaries)),
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / "lm_compare.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(list(metrics), bigram_loss, results / "lm_compare.png")
    print(json.dumps(result["optimizers"], indent=2))


if __name__ == "__main__":
    tyro.cli(main)
