"""The defaults on seven small tasks."""

import math
from typing import Any

from benchmarks.tables.formats import (
    NAMES,
    markdown,
    mean,
    read,
    spread,
    table,
)

SMALL_TASKS = {
    "lm_32_8": "language model, width 32, 8 × 32 bytes",
    "lm_64_8": "language model, width 64, 8 × 32 bytes",
    "lm_32_32": "language model, width 32, 32 × 32 bytes",
    "lm_tokens": "language model, width 64, 32 × 32 of 8,192 tokens",
    "classes": "digits",
    "vae": "variational autoencoder",
    "pinn": "Poisson's equation",
}


@table
def defaults() -> str:
    """Held-out losses over AdamW's, of the paper's b1 and γ and of the chosen ones."""
    file = read("defaults.json")
    tasks = file["results"]
    names = [
        name
        for optimizer, chosen in file["chosen"].items()
        for name in dict.fromkeys((f"{optimizer}_paper", chosen))
    ]
    rows = []
    for task, row in tasks.items():
        adamw = next(iter(row["losses"].values()))
        size = f"{row['num_params']:,} params, {row['steps']} steps"
        own = f"{mean(adamw):.3g} ± {spread(adamw):.1g}"
        cells = (relative(row["losses"].get(name), mean(adamw)) for name in names)
        rows.append([SMALL_TASKS[task], size, own, *cells])
    header = ["", "size", "AdamW's loss", *(described(file["candidates"][name]) for name in names)]
    return markdown(header, rows)


def relative(values: list[float] | None, reference: float) -> str | None:
    """Losses over a reference: the mean's difference in percent, or a factor from two on."""
    if values is None:
        return None
    ratio, deviation = mean(values) / reference, spread(values) / reference
    if ratio >= 2:
        return f"{ratio:.0f} × (± {deviation:.0f})"
    return f"{100 * (ratio - 1):+.1f} ± {100 * deviation:.1f}"


@table
def defaults_tuning() -> str:
    """Each candidate's tuning losses over AdamW's: the geometric mean and the worst task."""
    file = read("defaults.json")
    rows = []
    for name, candidate in file["candidates"].items():
        if candidate["optimizer"] == "adamw":
            continue
        ratios = {
            task: row["tuning"][name]["loss"] / min(adamw_tunings(row))
            for task, row in file["results"].items()
            if name in row["tuning"]
        }
        worst = max(ratios, key=lambda task: ratios[task])
        average = math.exp(mean(map(math.log, ratios.values()))) - 1
        behind = sum(ratio > 1.01 for ratio in ratios.values())
        rows.append(
            [
                described(candidate),
                f"{100 * average:+.1f}",
                f"{behind} of {len(ratios)}",
                f"{100 * (ratios[worst] - 1):+.1f} ({SMALL_TASKS[worst].split(',')[0]})",
            ]
        )
    header = ["", "geometric mean", "tasks more than a percent behind", "worst task"]
    return markdown(header, rows)


def adamw_tunings(row: dict[str, Any]) -> list[float]:
    """AdamW's tuned losses on a task, one for each b2."""
    return [tuning["loss"] for name, tuning in row["tuning"].items() if name.startswith("adamw")]


def described(candidate: dict[str, Any]) -> str:
    """An optimizer and the hyperparameters that a candidate fixes."""
    fixed = candidate["fixed"]
    kind = "weighted target" if candidate["weighted"] else "target"
    scale = f"γ {fixed['gamma']}" if "gamma" in fixed else f"{kind} {fixed['win_rate']}"
    return f"{NAMES[candidate['optimizer']]}, b1 {fixed['b1']}, {scale}"
