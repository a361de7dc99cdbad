"""What the race's runs say: losses by budget, and the steps that each entrant takes to AdamW's."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.lib.sweep import mean_win_rate
from benchmarks.tables.formats import NAMES
from benchmarks.tables.lm_race import SUMMARY

Row = dict[str, Any]


def steps_to(target: float, budgets: np.ndarray, losses: np.ndarray) -> float | None:
    """Steps at which a run with a full decay would reach a loss; None if no budget did.

    Args:
      target: the loss to reach.
      budgets: steps of the runs, ascending.
      losses: what each ended at.

    Returns:
      Interpolated between budgets in the logarithm of the steps; the least budget where even that
      reached it.
    """
    lowest = np.minimum.accumulate(losses)
    if lowest[-1] > target:
        return None
    if lowest[0] <= target:
        return float(budgets[0])
    return float(np.exp(np.interp(-target, -lowest, np.log(budgets))))


def losses_by_seed(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Budgets, ascending, and the losses of each seed at them, `[seed, budget]`."""
    budgets = sorted({row["key"]["steps"] for row in rows})
    seeds = sorted({row["key"]["seed"] for row in rows})
    table = {(row["key"]["seed"], row["key"]["steps"]): row["loss"] for row in rows}
    return np.array(budgets), np.array([[table[s, b] for b in budgets] for s in seeds])


def advantage(rows: list[Row], adamw: list[Row], budget: int) -> dict[str, Any]:
    """How many times fewer steps an entrant takes to AdamW's mean loss at a budget.

    A ratio is a lower bound where the entrant's shortest runs already reach the loss.
    """
    budgets, losses = losses_by_seed(adamw)
    target = float(losses[:, list(budgets).index(budget)].mean())
    budgets, losses = losses_by_seed(rows)
    steps = [steps_to(target, budgets, seed) for seed in losses]
    ratios = [None if s is None else budget / s for s in steps]
    mean = steps_to(target, budgets, losses.mean(axis=0))
    return {
        "adamw_loss": target,
        "ratio": None if mean is None else budget / mean,
        "ratio_by_seed": ratios,
        "bound": mean is not None and mean == float(budgets[0]),
        "bound_by_seed": [s is not None and s == float(budgets[0]) for s in steps],
    }


def summarize(
    rows: list[Row], flops: dict[tuple[str, str], float], seconds: dict[tuple[str, str], float]
) -> dict[str, Any]:
    """The tables, by regime and entrant.

    Args:
      rows: the journal's.
      flops: of an average step over AdamW's, by regime and entrant.
      seconds: of an average step over AdamW's, by regime and entrant.

    Returns:
      For each regime and entrant: the tuned point, the losses by budget, the mean and the spread
      over seeds, the advantage over AdamW in steps, in FLOPs and in seconds.
    """
    out: dict[str, Any] = {}
    raced = [row for row in rows if row["key"]["split"] == "validation"]
    for regime in dict.fromkeys(row["key"]["regime"] for row in raced):
        own = [row for row in raced if row["key"]["regime"] == regime]
        adamw = [row for row in own if row["key"]["entrant"] == "adamw"]
        names = list(dict.fromkeys(row["key"]["entrant"] for row in own))
        tuning = [row for row in rows if row["key"]["regime"] == regime]
        out[regime] = {}
        for name in names:
            mine = [row for row in own if row["key"]["entrant"] == name]
            tried = [r for r in tuning if r["key"]["entrant"] == name and r not in mine]
            budgets, losses = losses_by_seed(mine)
            relative = flops[regime, name]
            slower = seconds[regime, name]
            advantages = {}
            for budget in budgets[1:]:
                advantages[str(budget)] = advantage(mine, adamw, int(budget))
                ratio = advantages[str(budget)]["ratio"]
                advantages[str(budget)]["ratio_flops"] = ratio and ratio / relative
                advantages[str(budget)]["ratio_seconds"] = ratio and ratio / slower
            best = min(tried, key=lambda row: row["loss"])
            fixed = ("regime", "entrant", "steps", "seed", "split")
            out[regime][name] = {
                "point": {k: v for k, v in best["key"].items() if k not in fixed},
                "tries": len(tried),
                "tuning_loss": best["loss"],
                "losses": {str(b): losses[:, i].tolist() for i, b in enumerate(budgets)},
                "means": {str(b): float(losses[:, i].mean()) for i, b in enumerate(budgets)},
                "flops_over_adamw": relative,
                "seconds_over_adamw": slower,
                "win_rate": mean_win_rate(mine),
                "steps_adamw_over_steps": advantages,
            }
    return out


def plot(summary: dict[str, Any], path: Path) -> None:
    """Mean final losses by budget, in colour those of the README's table."""
    figure, panels = plt.subplots(
        1, len(summary), figsize=(4.6 * len(summary), 4.6), layout="constrained", squeeze=False
    )
    colours = dict(zip(SUMMARY, plt.colormaps["tab10"].colors, strict=False))
    for axes, (regime, entrants) in zip(panels[0], summary.items(), strict=True):
        for name in sorted(entrants, key=lambda name: name in colours):
            budgets = [int(b) for b in entrants[name]["losses"]]
            losses = np.array(list(entrants[name]["losses"].values()))
            if name not in colours:
                axes.plot(budgets, losses.mean(axis=1), color="0.8", linewidth=1)
                continue
            style = {"color": colours[name], "marker": "o", "markersize": 4, "linewidth": 2}
            axes.plot(budgets, losses.mean(axis=1), label=NAMES[name], **style)
            bounds = losses.min(axis=1), losses.max(axis=1)
            axes.fill_between(budgets, *bounds, color=colours[name], alpha=0.15, linewidth=0)
        axes.set(xscale="log", xlabel="steps, each run with a full decay", title=f"{regime} regime")
        axes.set_xticks(budgets, [str(b) for b in budgets], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    panels[0][0].set_ylabel("validation loss, nats per byte")
    panels[0][0].plot([], [], color="0.8", linewidth=1, label="others")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
