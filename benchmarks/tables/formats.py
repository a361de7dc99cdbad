"""What all tables use: the files of results, formats of numbers, and tables of Markdown."""

import functools
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
TABLES: dict[str, Callable[[], str]] = {}

NAMES = {
    "adamw": "AdamW",
    "sophia_g": "Sophia-G",
    "sophia_h": "Sophia-H",
    "sophia_h_paper": "Sophia-H, paper's h",
    "sophia_g_target": "Sophia-G, `win_rate_target`",
    "sophia_h_target": "Sophia-H, `win_rate_target`",
    "sophia_g_propagation": "Sophia-G, curvature propagation",
    "sophia_g_eigenbasis": "Sophia-G, eigenbasis",
    "sophia_h_eigenbasis": "Sophia-H, eigenbasis",
    "soap": "SOAP",
    "contrib_sophia": "`optax.contrib.sophia`",
    "lion": "Lion",
    "muon": "Muon, AdamW on the rest",
    "muon_adamw": "Muon, AdamW on the rest",
    "muon_sophia_g": "Muon, Sophia-G on the rest",
    "muon_sophia_g_propagation": "Muon, Sophia-G with curvature propagation",
    "muon_sophia_h": "Muon, Sophia-H on the rest",
    "muon_sophia_h_paper": "Muon, Sophia-H with paper's h",
}


@functools.cache
def read(name: str) -> Any:
    """A results file: what a JSON holds, or the rows of a journal."""
    text = (RESULTS / name).read_text()
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def fewer(ratio: float) -> str:
    """The share of steps that are saved where AdamW needs `ratio` times as many."""
    return percent(1 - 1 / ratio)


def percent(share: float, digits: int = 0) -> str:
    """A share in percent."""
    return f"{share:.{digits}%}".replace("%", " %")


def losses(values: Iterable[float]) -> str:
    """Losses of several seeds."""
    return ", ".join(f"{value:.3f}" for value in values)


def over(ratio: float | None) -> str:
    """The inverse of a ratio, for what AdamW's figure is divided by; a dash where there is none."""
    return f"{1 / ratio:.2f}" if ratio else "–"


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean."""
    values = list(values)
    return sum(values) / len(values)


def spread(values: list[float]) -> float:
    """The standard deviation over seeds."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def mean_or_diverged(found: Iterable[float | None]) -> str:
    """The mean of losses, where no run diverged."""
    known = list(found)
    return "diverged" if None in known else f"{mean(cast(list[float], known)):.3f}"


FORMATS: dict[str, Callable[[Any], str]] = {
    "fewer": fewer,
    "percent": percent,
    "percent.1": lambda share: percent(share, 1),
    "over": over,
    "losses": losses,
    "mean": lambda values: f"{mean(values):.3f}",
    "length": lambda values: str(len(values)),
    "hours": lambda rows: f"{sum(row['seconds'] for row in rows) / 3600:.1f} hours",
}


def markdown(header: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table of Markdown; None is an empty cell."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |"
        for line in lines
    )


def table(function: Callable[[], str]) -> Callable[[], str]:
    """Registers a table under its function's name, with dashes."""
    TABLES[function.__name__.replace("_", "-")] = function
    return function
