"""The race to AdamW's loss."""

import functools
from typing import Any

from benchmarks.tables.formats import NAMES, TABLES, losses, markdown, over, read, table

# The rows of the README's table, and the curves of its plot.
SUMMARY = ("adamw", "sophia_g", "sophia_h", "sophia_g_eigenbasis", "soap", "muon_adamw")


def entrants(regime: str) -> dict[str, dict[str, Any]]:
    """The race's results in one regime, in the order of `NAMES`."""
    found = read("lm_race.json")["results"][regime]
    return {name: found[name] for name in NAMES if name in found}


def at_most(ratio: float | None, bound: bool) -> str:
    """The inverse of a ratio, marked where it is an upper bound."""
    return ("≤ " if bound else "") + over(ratio)


def race(regime: str) -> str:
    """Mean losses by length, and the steps to AdamW's loss."""
    rows = []
    for name, row in entrants(regime).items():
        advantages = row["steps_adamw_over_steps"]
        means = [f"{value:.3f}" for value in row["means"].values()]
        rows.append(
            [
                NAMES[name],
                *means,
                *(at_most(found["ratio"], found["bound"]) for found in advantages.values()),
            ]
        )
    lengths = list(entrants(regime)["adamw"]["means"])
    header = ["", *(f"{steps} steps" for steps in lengths)]
    header += [f"to AdamW's at {steps}" for steps in lengths[1:]]
    return markdown(header, rows)


def race_by_seed(regime: str) -> str:
    """Losses and steps by seed, and what the longest run costs."""
    rows = []
    for name, row in entrants(regime).items():
        longest = list(row["steps_adamw_over_steps"].values())[-1]
        rows.append(
            [
                NAMES[name],
                *map(losses, row["losses"].values()),
                ", ".join(map(at_most, longest["ratio_by_seed"], longest["bound_by_seed"])),
                at_most(longest["ratio_flops"], longest["bound"]),
                at_most(longest["ratio_seconds"], longest["bound"]),
                f"{row['flops_over_adamw']:.2f}",
                f"{row['seconds_over_adamw']:.2f}",
            ]
        )
    lengths = list(entrants(regime)["adamw"]["losses"])
    header = ["", *(f"loss at {steps}" for steps in lengths), "steps by seed", "FLOPs", "seconds"]
    return markdown([*header, "FLOPs of a step", "seconds of a step"], rows)


@table
def race_regimes() -> str:
    """Batches, lengths and tries of each regime."""
    rows = []
    for regime, row in read("lm_race.json")["regimes"].items():
        setting = row["workload"]
        rows.append(
            [
                regime,
                f"{row['parameters']:,d}",
                f"{setting['batch_size']} × {setting['model']['context']}",
                f"{setting['curvature_batch']} sequences",
                row["tries"],
                row["steps"],
                ", ".join(map(str, row["budgets"])),
                len(row["seeds"]),
            ]
        )
    header = ["regime", "parameters", "sequences × bytes a step", "curvature", "tries"]
    return markdown([*header, "their steps", "steps", "seeds"], rows)


def race_points(regime: str) -> str:
    """The best tuning run of each entrant, and the win rate of its raced runs."""
    rows = []
    for name, row in entrants(regime).items():
        point = row["point"]
        rates = [point.get("learning_rate"), point.get("matrix_learning_rate")]
        shown = ", ".join(str(rate) for rate in rates if rate is not None)
        chosen = point.get("gamma", point.get("win_rate"))
        win_rate = None if row["win_rate"] is None else f"{row['win_rate']:.2f}"
        rest = (point.get("b1"), chosen, point.get("warmup"), row["tries"], win_rate)
        rows.append([NAMES[name], f"{row['tuning_loss']:.3f}", shown, *rest])
    header = ["", "loss", "learning rate, Muon's", "b1", "γ or target", "warm-up", "tries"]
    return markdown([*header, "win rate"], rows)


def regime_tables() -> None:
    """Registers the three tables of each regime of the race."""
    for regime in read("lm_race.json")["results"]:
        for name, render in (("", race), ("-by-seed", race_by_seed), ("-points", race_points)):
            TABLES[f"race-{regime}{name}"] = functools.partial(render, regime)


@table
def race_summary() -> str:
    """The rows of the race that the README shows."""
    regimes = list(read("lm_race.json")["results"])
    rows = []
    for name in SUMMARY:
        cells = []
        for regime in regimes:
            row = entrants(regime).get(name)
            if row is None:
                cells += [None, None]
                continue
            longest = list(row["steps_adamw_over_steps"].values())[-1]
            cells += [
                f"{list(row['means'].values())[-1]:.3f}",
                at_most(longest["ratio"], longest["bound"]),
            ]
        if any(cells):
            rows.append([NAMES[name], *cells])
    header = [""]
    for regime in regimes:
        setting = read("lm_race.json")["regimes"][regime]
        workload, model = setting["workload"], setting["workload"]["model"]
        shape = f"width {model['width']}, {workload['batch_size']} × {model['context']}"
        header += [f"{shape}, {setting['budgets'][-1]} steps: loss", "steps"]
    return markdown(header, rows)


regime_tables()
