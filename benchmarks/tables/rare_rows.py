"""Rows of an embedding that the curvature has not seen."""

from typing import Any

from benchmarks.tables.formats import losses, markdown, mean, percent, read, table

RARE_ROWS = {
    "adamw": "AdamW",
    "paper": "Sophia-G, the paper's rule",
    "target": "`win_rate_target(0.7)` instead of γ = 0.05",
    "weighted target": "`win_rate_target(0.8, weighted=True)`",
    "target 0.05": "`win_rate_target(0.05)`",
    "global target": "`win_rate_target(0.7)` for all parameters together",
    "target, floor 1 mean": "`win_rate_target(0.7)`, denominator at least γ times the mean h",
    "adam": "Adam on the embedding",
    "floor 1 mean": "denominator at least γ times the tensor's mean h",
    "floor 0.1 mean": "denominator at least a tenth of that",
    "whole batch": "curvature of the whole batch",
    "gradient squared": "N g² where the estimate is zero",
    "curvature propagation": "curvature propagation",
    "wait": "no step where h is zero",
}


def against_the_papers_rule(found: dict[str, Any], *, tied: bool) -> str:
    """Losses of the variants of `rare_rows.py`, with the share of rows without curvature."""
    paper = found["paper"]["losses"]
    lines = []
    for name in (name for name in RARE_ROWS if name in found):
        own, flat = found[name]["losses"], found[name]["flat_of_touched"]
        lines.append(
            [
                RARE_ROWS[name],
                *([] if tied else [percent(mean(flat)) if flat else None]),
                f"{found[name]['learning_rate']:g}",
                losses(own),
                None if name == "paper" else f"{mean(own) - mean(paper):+.3f}",
            ]
        )
    columns = ["learning rate", "loss by seed", "change"]
    return markdown(["", *([] if tied else ["rows"]), *columns], lines)


@table
def rare_rows() -> str:
    """The losses of ways to treat rows of the embedding that the curvature has not seen."""
    return against_the_papers_rule(read("rare_rows.json")["results"], tied=False)


@table
def rare_rows_tied() -> str:
    """Those of a few ways with the embedding as the output matrix."""
    return against_the_papers_rule(read("rare_rows.json")["tied"], tied=True)
