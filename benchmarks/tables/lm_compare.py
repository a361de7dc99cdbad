"""The trainer's own comparison and its tuning."""

from typing import Any

from benchmarks.tables.formats import NAMES, losses, markdown, percent, read, table


@table
def lm_compare() -> str:
    """Validation losses of the trainer's own comparison."""
    file = read("lm_compare.json")
    rows = [
        [
            NAMES[name.removesuffix("_half")],
            row["steps"],
            losses(row["validation_loss"]),
            f"{row['validation_loss_mean']:.3f}",
            percent(row["curvature_share"], 1) if row["curvature_share"] else None,
            f"{row['win_rate']:.2f}" if row["win_rate"] is not None else None,
        ]
        for name, row in file["optimizers"].items()
    ]
    rows.append(["bigram counts", None, None, f"{file['bigram_loss']:.3f}", None, None])
    header = ["", "steps", "validation loss by seed", "mean", "time on curvature", "win rate"]
    return markdown(header, rows)


def tuned() -> dict[str, list[dict[str, Any]]]:
    """The trainer's tuning runs by optimizer."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in read("lm_tuning.jsonl"):
        found.setdefault(row["optimizer"], []).append(row)
    return found


@table
def lm_tuning() -> str:
    """The best try of each optimizer."""
    rows = []
    for name, tries in tuned().items():
        best = min(tries, key=lambda row: row["tune_loss"])
        win_rate = best["win_rate"]
        rows.append(
            [
                NAMES[name],
                len(tries),
                *(best[key] for key in ("learning_rate", "b1", "gamma", "warmup")),
                f"{best['tune_loss']:.3f}",
                None if win_rate is None else f"{win_rate:.2f}",
            ]
        )
    header = ["", "tries", "learning rate", "b1", "γ", "warm-up", "loss", "win rate"]
    return markdown(header, rows)


@table
def tuning_by_b1() -> str:
    """The best tuning loss at each b1."""
    tries = tuned()
    rates = sorted({row["b1"] for rows in tries.values() for row in rows}, reverse=True)
    rows = []
    for b1 in rates:
        best = [[row["tune_loss"] for row in rows if row["b1"] == b1] for rows in tries.values()]
        rows.append([f"b1 = {b1}", *(f"{min(found):.3f}" if found else None for found in best)])
    return markdown(["", *(NAMES[name] for name in tries)], rows)
