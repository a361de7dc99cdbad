"""Writes the tables and figures of README and docs from the files of `benchmarks/results`.

    python -m benchmarks.lib.tables            rewrites what differs
    python -m benchmarks.lib.tables --check    names what differs, and exits with 1

A page holds a generated table between two comments, and a figure of a sentence between two more:

    <!-- table: race-small -->
    <!-- /table -->

    It had <!-- value: lm_race.json > results > small > lion > tries | d -->16<!-- /value --> tries.

The name of a table is a function of this module. A value is a path into a file, then a format: one
of Python's, or one of `FORMATS`. On the pages of `STRICT` no digit stands outside of these marks,
code and links; on the others, none with a unit of `MEASURED` or with three decimals.

The list of differences comes from the head of the optimizer's module instead of a file of results.
"""

import argparse
import ast
import functools
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
STRICT = ("docs/benchmarks.md", "benchmarks/README.md")
HOW = "benchmarks/lib/tables.py"
MEASURED = r"percent|nats|times|passes|wrong|fewer|more"

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
# The rows of the README's table, and the curves of its plot.
SUMMARY = ("adamw", "sophia_g", "sophia_h", "sophia_g_eigenbasis", "soap", "muon_adamw")
SIZES = {"1m": "1M", "11m": "11M", "gpt2-124m": "124M", "gpt2-1.5b": "1.5B"}


# --- Files and formats ----------------------------------------------------------------------------


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


# --- The language model ---------------------------------------------------------------------------


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


# --- The race -------------------------------------------------------------------------------------


def entrants(regime: str) -> dict[str, dict[str, Any]]:
    """The race's results in one regime, in the order of `NAMES`."""
    found = read("lm_race.json")["results"][regime]
    return {name: found[name] for name in NAMES if name in found}


def race(regime: str) -> str:
    """Mean losses by length, and the steps to AdamW's loss."""
    rows = []
    for name, row in entrants(regime).items():
        advantages = row["steps_adamw_over_steps"]
        means = [f"{value:.3f}" for value in row["means"].values()]
        rows.append([NAMES[name], *means, *(over(found["ratio"]) for found in advantages.values())])
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
                ", ".join(map(over, longest["ratio_by_seed"])),
                over(longest["ratio_flops"]),
                over(longest["ratio_seconds"]),
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
            cells += [f"{list(row['means'].values())[-1]:.3f}", over(longest["ratio"])]
        if any(cells):
            rows.append([NAMES[name], *cells])
    header = [""]
    for regime in regimes:
        setting = read("lm_race.json")["regimes"][regime]
        workload, model = setting["workload"], setting["workload"]["model"]
        shape = f"width {model['width']}, {workload['batch_size']} × {model['context']}"
        header += [f"{shape}, {setting['budgets'][-1]} steps: loss", "steps"]
    return markdown(header, rows)


# --- Warm-up and γ --------------------------------------------------------------------------------

CHANGES = {
    "as it is": "the paper's",
    "|h| where negative": r"\|h\|",
    "tensor's mean where negative": r"the tensor's mean of \|h\| where negative",
    "floor: tensor's mean / 10": "at least a tenth of that mean",
    "root of the mean square": "the root of the mean square of the estimates",
    "no step where negative": "no step where negative",
    "Nesterov": "Nesterov's m",
    "clip grows over 100 steps": "the clip grows over 100 steps",
    "m corrected": "m divided by 1 - b1^t",
    "4 probes": "4 probes",
    "estimates in each of 20 steps": "an estimate in each of the first 20 steps",
    "|h|, k = 50 in the second half": r"\|h\|, k = 50 in the second half",
    "|h|, b1 rises to 0.9": r"\|h\|, b1 rises to 0.9 over the run",
    "|h|, gradients not clipped": r"\|h\|, gradients not clipped",
}
WARMUPS = (0.02, 0.2)


@table
def warmup_rates() -> str:
    """Losses of three seeds by learning rate and warm-up, for the paper's h and for |h|."""
    found = read("warmup.json")["results"]["instead"]["sophia_h_paper"]
    rates = (0.003, 0.004, 0.006, 0.008)
    rows = [
        [
            f"{CHANGES[name]}, warm-up {percent(warmup)}",
            *(losses(found[name][f"warmup {warmup}, learning_rate {rate}"]) for rate in rates),
        ]
        for name in ("as it is", "|h| where negative")
        for warmup in WARMUPS
    ]
    return markdown(["learning rate", *map(str, rates)], rows)


@table
def warmup_changes() -> str:
    """The first seed's losses of each change to the algorithm."""
    found = read("warmup.json")["results"]["instead"]["sophia_h_paper"]
    rates = (0.003, 0.004, 0.006)
    rows = [
        [
            CHANGES.get(name, name.replace("|", r"\|")),
            *(
                f"{found[name][f'warmup {warmup}, learning_rate {rate}'][0]:.3f}"
                for warmup in WARMUPS
                for rate in rates
            ),
        ]
        for name in found
    ]
    header = ["", *(f"{percent(warmup)}: {rate}" for warmup in WARMUPS for rate in rates)]
    return markdown(header, rows)


@table
def targets() -> str:
    """The best fixed γ of each model and batch, and targets over it."""
    file = read("self_tuning_gamma_sophia_g.json")
    kinds = [name for name in file["cells"][0] if name.startswith("target ")]
    rows = []
    for cell in sorted(file["cells"], key=lambda cell: (cell["width"], cell["batch"])):
        best = cell["best gamma"]
        ratios = (f"{cell[kind]['over_best']:.3f}" for kind in kinds)
        name = f"{cell['width']}, {cell['batch']}"
        rows.append([name, f"{best['gamma']:.3g}", f"{mean(best['losses']):.3f}", *ratios])
    names = [kind.removeprefix("target ") for kind in kinds]
    return markdown(["width, sequences", "best γ", "its loss", *names], rows)


# --- The eigenbasis -------------------------------------------------------------------------------

ABLATIONS = {
    "f = 10": "basis refreshed at every 10th step",
    "f = 100": "basis refreshed at every 100th step",
    "blocks of 128": "blocks of 128",
    "blocks of 64": "blocks of 64",
    "blocks of 32": "blocks of 32",
    "basis from samples": "basis from the sampled gradients of the curvature",
    "inputs only": "matrices turned on the side of their inputs only",
    "outputs only": "matrices turned on the side of their outputs only",
    "embeddings not turned": "embeddings not turned",
    "no Nesterov": "no Nesterov momentum",
    "no curvature": "no curvature: the sign of each turned coordinate",
    "no clip": "no clip",
}


@table
def ablations() -> str:
    """The losses of Sophia-G in the eigenbasis with one thing changed."""
    file = read("ablations.json")
    rows = [["as raced", "1", losses(file["raced"]), None]]
    for name, shown in ABLATIONS.items():
        for factor, found in file["results"]["changes"].get(name, {}).items():
            if None in found.values():
                rows.append([shown, factor, "diverged", None])
                continue
            worse = mean(loss - file["raced"][int(seed)] for seed, loss in found.items())
            rows.append([shown, factor, losses(found.values()), f"{worse:+.3f}"])
    return markdown(["", "learning rate", "loss by seed", "change"], rows)


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


def mean_or_diverged(found: Iterable[float | None]) -> str:
    """The mean of losses, where no run diverged."""
    known = list(found)
    return "diverged" if None in known else f"{mean(cast(list[float], known)):.3f}"


@table
def ablation_rates() -> str:
    """Losses by the learning rate over the tuned one."""
    rates = read("ablations.json")["results"]["rates"]
    factors = list(rates["adamw"])
    rows = [
        [NAMES[name], *(mean_or_diverged(found[factor].values()) for factor in factors)]
        for name, found in rates.items()
    ]
    return markdown(["learning rate over the tuned one", *factors], rows)


@table
def batch_sizes() -> str:
    """Losses of each optimizer by the tokens of a step, each with its tuned learning rate."""
    file = read("batch_sizes.json")
    batches = list(file["results"]["adamw"])
    rows = []
    for name, found in file["results"].items():
        cells: list[str | None] = []
        for batch in batches:
            row = found.get(batch)
            cells += [mean_or_diverged(row["losses"]), f"{row['learning_rate']:g}"] if row else [
                None, None
            ]  # fmt: skip
        rows.append([NAMES[name], *cells])
    header = [
        cell for batch in batches for cell in (f"{int(batch) * file['context']:,} tokens", "rate")
    ]
    return markdown(["", *header], rows)


CURVATURES = {
    "whole batch": "the whole batch in each estimate",
    "each step": "an estimate in each step",
    "whole batch, each step": "the whole batch in each step",
}


@table
def curvature_parts() -> str:
    """The losses of Sophia-G in the eigenbasis by what its curvature sees, and of SOAP."""
    file = read("batch_sizes.json")
    rows: list[list[str | None]] = []
    for batch in file["curvatures"]["whole batch"]:
        tokens = f"{int(batch) * file['context']:,}"
        own = file["results"]["sophia_g_eigenbasis"][batch]["losses"]
        rows.append([tokens, "as above", losses(own), None])
        others = {
            **{shown: file["curvatures"][name].get(batch) for name, shown in CURVATURES.items()},
            "SOAP": file["results"]["soap"][batch],
        }
        for shown, found in others.items():
            if found:
                more = mean(a - b for a, b in zip(found["losses"], own, strict=True))
                rows.append([tokens, shown, losses(found["losses"]), f"{more:+.3f}"])
    return markdown(["tokens", "curvature", "loss by seed", "change"], rows)


METHODS = {
    "qr": "QR",
    "cholesky_qr2": "CholeskyQR, two rounds",
    "shifted_cholesky_qr3": "CholeskyQR, shifted, three rounds",
    "newton_schulz": "Newton-Schulz, 12 steps",
}


def seconds_over_qr(part: str) -> tuple[list[str], list[list[str]]]:
    """A device's seconds over those of QR: the shapes, and a row for each method."""
    rows = read("orthonormalize.json")[part]["rows"]
    header = [f"{row['stack']} of {row['size']}²" for row in rows]
    return header, [[f"{row['seconds_over_qr'][name]:.2f}" for row in rows] for name in METHODS]


@table
def orthonormalize() -> str:
    """Errors and seconds of the ways to orthonormalize a basis."""
    file = read("orthonormalize.json")
    middle = next(row for row in file["cpu"]["rows"] if row["size"] == 256)
    kinds = ("2 decades", "6 decades", "singular, no shift")
    cpu_header, cpu = seconds_over_qr("cpu")
    gpu_header, gpu = seconds_over_qr("gpu")
    rows = []
    for (name, shown), *seconds in zip(METHODS.items(), cpu, gpu, strict=True):
        errors = (middle["errors"][name][kind] for kind in kinds)
        shown_errors = ("not finite" if error is None else f"{error:.0e}" for error in errors)
        rows.append([shown, *shown_errors, *itertools.chain(*seconds)])
    header = ["", *(f"error, {kind}" for kind in kinds), *(f"CPU, {shape}" for shape in cpu_header)]
    return markdown([*header, *(f"GPU, {shape}" for shape in gpu_header)], rows)


@table
def orthonormalize_counts() -> str:
    """FLOPs and compilations of the ways to orthonormalize a basis."""
    file = read("orthonormalize.json")
    tpu = file["tpu"]["rows"]
    rows = [
        [
            shown,
            f"{file['flops_over_cube'][name]:.1f}",
            *(f"{row['methods'][name]['xla_flops_over_cube']:.1f}" for row in tpu),
            *(f"{row['methods'][name]['compile_seconds']:.0f}" for row in tpu),
        ]
        for name, shown in METHODS.items()
    ]
    shapes = [f"{row['stack']} of {row['size']}²" for row in tpu]
    header = ["", "FLOPs", *(f"XLA's FLOPs, {shape}" for shape in shapes)]
    return markdown([*header, *(f"compilation, {shape}" for shape in shapes)], rows)


# --- Images ---------------------------------------------------------------------------------------


def images(file: str, task: str) -> str:
    """Test losses of a task by seed."""
    rows = []
    for name, row in read(file)["results"][task].items():
        tested = [run["test"]["loss"] for run in row["runs"]]
        rows.append([NAMES[name], losses(tested), f"{mean(tested):.3f}"])
    return markdown(["", "test loss by seed", "mean"], rows)


TABLES |= {
    "digits": functools.partial(images, "vision.json", "classes"),
    "pixels": functools.partial(images, "vision.json", "pixels"),
    "captions": functools.partial(images, "contrastive.json", "captions"),
}

# --- Defaults -------------------------------------------------------------------------------------

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


# --- The estimators -------------------------------------------------------------------------------

TARGETS = {
    "Hutchinson, signs": "hessian",
    "Hutchinson, normal": "hessian",
    "GNB, labels": "gauss_newton",
    "GNB, curvature propagation": "gauss_newton",
}


def quality(estimator: str, **chosen: Any) -> dict[str, Any]:
    """The one row of an estimator against its own diagonal with these settings."""
    wanted = {"data": "reference", "share": 1, "probes": 1, "refreshes": 100} | chosen
    wanted |= {"estimator": estimator, "target": TARGETS[estimator]}
    (row,) = (
        row
        for row in read("estimator_quality.json")["rows"]
        if all(row[key] == value for key, value in wanted.items())
    )
    return row


def wrong(row: dict[str, Any], kind: str = "all") -> str:
    """The share of coordinates that are clipped under one diagonal alone."""
    return percent(row["errors"][kind]["flips"], 1)


@table
def estimator_errors() -> str:
    """Wrong verdicts by refreshes and by the part of the batch."""
    rows = [
        [
            name,
            f"{quality(name)['cost']:.2f}",
            *(wrong(quality(name, refreshes=refreshes)) for refreshes in (1, 10, 100)),
            wrong(quality(name, share=8)),
            f"{quality(name, share=8)['cost']:.2f}",
            wrong(quality(name, probes=16, refreshes=1)),
        ]
        for name in TARGETS
    ]
    header = ["", "cost of a refresh", "1 refresh", "10 refreshes", "100 refreshes"]
    return markdown([*header, "100, on an eighth", "cost on an eighth", "1 of 16 probes"], rows)


@table
def estimator_errors_by_kind() -> str:
    """Wrong verdicts of each kind of parameter, and how the two exact diagonals differ."""
    names = ("Hutchinson, signs", "GNB, labels", "GNB, curvature propagation")
    exact = read("estimator_quality.json")["hessian_and_gauss_newton"]
    rows = [
        [
            kind,
            *(wrong(quality(name), kind) for name in names),
            percent(exact[kind]["flips"], 1),
            percent(exact[kind]["negative"], 1),
        ]
        for kind in [*(kind for kind in exact if kind != "all"), "all"]
    ]
    return markdown(["", *names, "the two diagonals", "Hessian below zero"], rows)


@table
def estimator_errors_in_a_run() -> str:
    """Wrong verdicts of one average on other batches, and along a run."""
    rows = [
        [name, *(wrong(quality(name, data=data, share=2)) for data in ("reference", "next", "run"))]
        for name in ("Hutchinson, signs", "GNB, labels", "GNB, curvature propagation")
    ]
    return markdown(["", "reference batch", "next batches", "the run's"], rows)


# --- What a step costs ----------------------------------------------------------------------------


@table
def step_flops() -> str:
    """FLOPs of the average step by model."""
    found = read("step_cost.json")["over_adamw"]
    names = ("sophia_g", "sophia_h", "contrib_sophia", "lion", "muon")
    rows = [
        [shown, *(f"{found[f'flops/{size}/{name}']['flops_average']:.3f}" for name in names)]
        for size, shown in SIZES.items()
    ]
    return markdown(["parameters", *(NAMES[name] for name in names)], rows)


@table
def step_flops_in_the_eigenbasis() -> str:
    """FLOPs of the average step in the eigenbasis by model and by the interval of the bases."""
    found = read("step_cost.json")["over_adamw"]
    columns = {
        f"{NAMES[name]}, {shown}": (name, key)
        for name in ("sophia_g_eigenbasis", "soap")
        for shown, key in {
            "f = 10": "flops_average",
            "f = 1": "flops_average_basis_in_each_step",
        }.items()
    }
    rows = [
        [shown, *(f"{found[f'flops/{size}/{name}'][key]:.3f}" for name, key in columns.values())]
        for size, shown in SIZES.items()
    ]
    return markdown(["parameters", *columns], rows)


@table
def step_seconds_by_width() -> str:
    """Seconds of the train step in the eigenbasis by width."""
    found = read("step_cost.json")["over_adamw"]
    keys = [key for key in found if "/width-" in key]
    names = ("sophia_g", "sophia_g_eigenbasis", "soap")
    rows = [[NAMES[name], *(f"{found[key][name]:.2f}" for key in keys)] for name in names]
    widths = [f"width {key.rpartition('-')[2]}" for key in keys]
    return markdown(["", *widths], rows)


@table
def step_flops_by_interval() -> str:
    """FLOPs of the average step by `update_interval`."""
    found = read("step_cost.json")["over_adamw"]
    names = ("sophia_g", "sophia_h", "contrib_sophia")
    intervals = list(found[f"interval/gpt2-1.5b/{names[0]}"])
    rows = [
        [NAMES[name], *(f"{found[f'interval/gpt2-1.5b/{name}'][k]:.3f}" for k in intervals)]
        for name in names
    ]
    return markdown(["", *(f"k = {k}" for k in intervals)], rows)


@table
def step_flops_by_share() -> str:
    """FLOPs of the average step by the part of the batch that an estimate sees."""
    found = read("step_cost.json")["over_adamw"]
    shares = (1, 2, 4, 8, 16)
    rows = [
        [NAMES[name], *(f"{found[f'share/11m/{share}/{name}']:.3f}" for share in shares)]
        for name in ("sophia_g", "sophia_h")
    ]
    return markdown(["", "all", *(f"1/{share}" for share in shares[1:])], rows)


@table
def update_cost() -> str:
    """The update off a refresh, for a TPU and a CPU."""
    found = read("step_cost.json")["runs"]
    rows = []
    for name in ("adamw", "lion", "sophia_g", "sophia_h", "contrib_sophia", "muon"):
        tpu, cpu = (found[f"update/{device}/gpt2-1.5b/{name}"] for device in ("tpu", "cpu"))
        counts = (f"{tpu['passes']:.1f}", f"{cpu['passes']:.1f}", f"{cpu['temporaries']:.1f}")
        rows.append([NAMES[name], *counts, cpu["copies"]])
    return markdown(["", "passes, TPU", "passes, CPU", "temporaries, CPU", "copies, CPU"], rows)


@table
def step_seconds() -> str:
    """Seconds of the update and of the train step."""
    found = read("step_cost.json")["over_adamw"]
    timings = ("update/cpu/1m", "update/cpu/11m", "step/cpu/1m")
    rows = [
        [NAMES[name], *(f"{found[f'seconds/{timing}'][name]:.2f}" for timing in timings)]
        for name in ("sophia_g", "sophia_h", "contrib_sophia", "lion", "muon")
    ]
    return markdown(["", "update, 1M", "update, 11M", "train step, 1M"], rows)


# --- Pods -----------------------------------------------------------------------------------------


def pods(key: str, **chosen: Any) -> list[dict[str, Any]]:
    """The rows of a list of `pod_cost.json` with these settings."""
    rows = read("pod_cost.json")[key]
    return [row for row in rows if all(row[name] == value for name, value in chosen.items())]


@table
def pod_ratios() -> str:
    """FLOPs and memory on sixteen chips."""
    found = [row for row in pods("over_adamw", topology="v5e:4x4") if row["model"] == "gpt2-124m"]
    rows = [
        [
            NAMES[row["optimizer"]],
            f"{row['batch_per_chip']} in {row['accumulate']}",
            f"{row['flops_average_over_adamw']:.3f}",
            *(f"{row[f'{kind}_bytes_over_adamw']:.3f}" for kind in ("temp", "peak")),
            "yes" if row["fits"] else "no",
        ]
        for row in found
    ]
    columns = ["sequences a chip, microbatches", "FLOPs", "temporary memory", "peak memory", "fits"]
    return markdown(["", *columns], rows)


@table
def pod_eigenbasis() -> str:
    """What the eigenbasis costs on sixteen chips, over AdamW."""
    columns = {
        "FLOPs, f = 10": "flops_average",
        "FLOPs, f = 1": "flops_basis_in_each_step",
        "state": "state_bytes",
        "peak memory": "peak_bytes",
        "bytes moved": "moved_bytes",
        "compilation": "compile_seconds",
    }
    found = [
        row
        for name in ("sophia_g", "sophia_g_eigenbasis", "soap")
        for row in pods("over_adamw", topology="v5e:4x4", optimizer=name)
    ]
    rows = []
    for row in found:
        ratios = (row.get(f"{key}_over_adamw") for key in columns.values())
        cells = ("–" if ratio is None else f"{ratio:.3f}" for ratio in ratios)
        rows.append([NAMES[row["optimizer"]], *cells])
    return markdown(["", *columns], rows)


@table
def pod_scale() -> str:
    """What a chip does and holds on pods of several sizes."""
    topologies = ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16")
    rows = []
    for what, key, unit in (
        ("TFLOP an average step", "flops_average", 1e12),
        ("GB at the peak", "peak_bytes", 1e9),
    ):
        for name in ("adamw", "sophia_g"):
            cells = []
            for topology in topologies:
                chosen = {"optimizer": name, "topology": topology, "batch_per_chip": 16}
                (plan,) = pods("plans", model="gpt2-124m", **chosen)
                cells.append(f"{plan[key] / unit:.3f}")
            rows.append([f"{NAMES[name]}, {what}", *cells])
    return markdown(["", *(f"`{topology}`" for topology in topologies)], rows)


regime_tables()

# --- The list of differences ----------------------------------------------------------------------


@table
def differences() -> str:
    """The differences from the paper and from other code."""
    module = ast.parse((ROOT / "sophia_optax/_scale_by_sophia.py").read_text())
    text = ast.get_docstring(module) or ""
    listed = text[text.index("Differences from ") :]
    return re.sub(r"^Differences from (.+):$", r"## What differs from \1", listed, flags=re.M)


# --- Pages ----------------------------------------------------------------------------------------

_TABLE = re.compile(r"^(<!-- table: ([\w.-]+) -->\n)(.*?)^(<!-- /table -->)$", re.M | re.S)
_VALUE = re.compile(r"(<!-- value: ([^|]+?) \| ([^|]+?) -->)(.*?)(<!-- /value -->)", re.S)
# What may hold digits on a strict page.
_EXEMPT = re.compile(
    r"""^\ *```.*?^\ *```$            # blocks of code
    | `[^`\n]*[A-Za-z][^`\n]*`       # code with a letter in it
    | \[\d{4}\.\d{5}\]\([^)]*\)     # links to arXiv
    | \]\([^)\s]*\)                 # addresses of other links
    | <!--.*?--> | </?[a-z][^>]*>    # comments and tags
    """,
    re.M | re.S | re.X,
)
_NUMBER = re.compile(r"(?<![\w.])(?<!\w-)\d[\d,.]*")
_FIGURE = re.compile(rf"(?<![\w.])(?:\d[\d,.]*\s?(?:%|(?:{MEASURED})\b)|(?!0\.965)\d+\.\d{{3,}})")


def pages() -> list[Path]:
    """The READMEs and the site's pages."""
    readmes = ("README.md", "benchmarks/README.md", "examples/lm/README.md", "notebooks/README.md")
    return [*(ROOT / name for name in readmes), *sorted((ROOT / "docs").rglob("*.md"))]


def value(path: str, form: str) -> str:
    """What a path into a results file holds, in a format."""
    name, *keys = path.split(" > ")
    try:
        found = read(name)
        for key in keys:
            found = found[int(key)] if isinstance(found, list) else found[key]
    except (OSError, LookupError, ValueError):
        return "not in the results"
    return FORMATS[form](found) if form in FORMATS else format(found, form)


def rendered(name: str) -> str:
    """A table by its name."""
    try:
        return TABLES[name]()
    except (OSError, LookupError, ValueError) as error:
        return f"{error!r} instead of a table"


def generated(text: str) -> str:
    """A page with its tables and values made anew."""
    text = _TABLE.sub(lambda mark: f"{mark[1]}\n{rendered(mark[2])}\n\n{mark[4]}", text)
    return _VALUE.sub(lambda mark: mark[1] + value(mark[2], mark[3]) + mark[5], text)


def faults(page: str, text: str) -> Iterator[str]:
    """What is wrong with a page's numbers, a sentence each.

    Args:
      page: its path from the root of the repository.
      text: what it holds.

    Yields:
      The file and the table, value or number.
    """
    for mark in _TABLE.finditer(text):
        if mark[3].strip() != rendered(mark[2]):
            yield f"{page}: table {mark[2]} is not what the results give"
    for mark in _VALUE.finditer(text):
        if mark[4] != (right := value(mark[2], mark[3])):
            yield f"{page}: value {mark[2]} is {right}, not {mark[4]}"
    if re.search(r"^\s*<!-- /?value", text, re.MULTILINE):
        yield f"{page}: a value begins a line, which Markdown takes for a block"
    prose = _EXEMPT.sub(" ", _VALUE.sub(" ", _TABLE.sub(" ", text)))
    pattern = _NUMBER if page in STRICT else _FIGURE
    for found in pattern.finditer(prose):
        line = prose[prose.rfind("\n", 0, found.start()) + 1 : prose.find("\n", found.end())]
        yield f"{page}: {found[0]!r} is quoted without its file; see {HOW}: {line.strip()}"


def places(texts: dict[str, str]) -> dict[str, list[str]]:
    """On which pages each table stands."""
    found: dict[str, list[str]] = {name: [] for name in TABLES}
    for page, text in texts.items():
        for mark in _TABLE.finditer(text):
            found.setdefault(mark[2], []).append(page)
    return found


def check(texts: dict[str, str]) -> list[str]:
    """All faults of the pages, by their paths from the root of the repository."""
    found = [fault for page, text in texts.items() for fault in faults(page, text)]
    for name, where in places(texts).items():
        if len(where) != 1:
            found.append(f"table {name} stands on {len(where)} pages, not on one: {where}")
    return found


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page differs")
    arguments = parser.parse_args()
    texts = {str(page.relative_to(ROOT)): page.read_text() for page in pages()}
    if not arguments.check:
        for page, text in texts.items():
            texts[page] = generated(text)
            if texts[page] != text:
                (ROOT / page).write_text(texts[page])
                print(f"wrote {page}")
    found = check(texts)
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
