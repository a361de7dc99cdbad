"""How the batch size moves the optimizers against each other, at a fixed number of steps.

    python -m benchmarks.batch_sizes [--quick] [--batches 8 32 128 512] [--curvature-batches 128]

The model and the text are those of `lm_race`. Each optimizer starts from the point that the race
tuned in the large regime, at 64 sequences a step and as many steps as here. At each batch size its
learning rate climbs from there, with the same number of tries for all, on the `tune` split and a
seed of its own. The best rate runs on other seeds and is judged on the `validation` split. An
estimate of the curvature uses an eighth of the batch, and four sequences at least.

Sophia-G in the eigenbasis also runs at its tuned rate with more sequences in its curvature: the
whole batch in each estimate, or an estimate in each step, or both.

Runs are kept in `results/batch_sizes.jsonl` as they end, and what is there is not run again;
`results/batch_sizes.json` has the table and `batch_sizes.png` the plot. Both have what has run.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro

from benchmarks.entrants import ENTRANTS
from benchmarks.lib.journal import Journal
from benchmarks.lib.plots import line_over_seeds
from benchmarks.lib.provenance import RESULTS, provenance
from benchmarks.lib.sweep import TUNING_SEED, Runs, Workload
from benchmarks.lm_race import QUICK, REGIMES, raced
from benchmarks.tables.formats import NAMES
from examples.lm import data
from examples.lm.model import parameter_count
from examples.lm.tune import search

REGIME = REGIMES["large"]
CURVED = "sophia_g_eigenbasis"
CURVATURES = {
    "whole batch": (True, 10),
    "each step": (False, 1),
    "whole batch, each step": (True, 1),
}
"""Whether the whole batch estimates the curvature, and steps from one estimate to the next."""


@dataclass(frozen=True)
class BatchSizesConfig:
    """What to run.

    Attributes:
      batches: sequences in a step.
      curvature_batches: those of them at which the curvature sees more of the batch.
      entrants: names in `ENTRANTS`.
      tries: learning rates that each entrant may try at each batch size.
      seeds: of the reported runs; tuning uses another.
      steps: of every run.
      quick: a few steps of one entrant, to see that it runs; writes no results.
      runs: the file of finished runs.
    """

    batches: tuple[int, ...] = (8, 32, 128, 512)
    curvature_batches: tuple[int, ...] = (128,)
    entrants: tuple[str, ...] = ("adamw", "sophia_g_eigenbasis", "soap", "sophia_g")
    tries: int = 4
    seeds: tuple[int, ...] = REGIME.seeds
    steps: int = REGIME.steps
    quick: bool = False
    runs: Path = RESULTS / "batch_sizes.jsonl"


def workload(batch_size: int, quick: bool = False) -> Workload:
    """The race's model with another batch, and the part of it that estimates the curvature."""
    own = (QUICK if quick else REGIME).workload
    part = min(max(batch_size // 8, 4), batch_size)
    return replace(own, batch_size=batch_size, curvature_batch=part)


def enter(
    config: BatchSizesConfig, journal: Journal, corpus: data.Corpus, batch: int, name: str
) -> None:
    """Tunes the learning rate of an entrant at a batch size, and runs the best on other seeds."""
    run = workload(batch, config.quick).run(ENTRANTS[name])
    runs = Runs(journal, corpus, run, batch=str(batch), entrant=name)
    start = raced("large", name)["point"]

    def loss_of(point: dict[str, float]) -> float:
        return runs({**start, **point}, config.steps, TUNING_SEED, "tune")["loss"]

    rate = {"learning_rate": (start["learning_rate"],)}
    best = search(rate, config.tries, loss_of)["point"]
    for seed in config.seeds:
        runs({**start, **best}, config.steps, seed, "validation")


def vary_curvature(
    config: BatchSizesConfig, journal: Journal, corpus: data.Corpus, batch: int
) -> None:
    """Runs Sophia-G in the eigenbasis at its tuned rate with other parts of the batch."""
    rate = summarize(journal.rows)[CURVED][str(batch)]["learning_rate"]
    point = {**raced("large", CURVED)["point"], "learning_rate": rate}
    for name, (whole, interval) in CURVATURES.items():
        own = replace(workload(batch), update_interval=interval)
        run = (replace(own, curvature_batch=batch) if whole else own).run(ENTRANTS[CURVED])
        runs = Runs(journal, corpus, run, batch=str(batch), entrant=CURVED, curvature=name)
        for seed in config.seeds:
            runs(point, config.steps, seed, "validation")


def summarize(rows: list[dict[str, Any]], curvature: str | None = None) -> dict[str, Any]:
    """Each entrant's tuned learning rate and losses by seed, by batch size.

    Args:
      rows: the journal's.
      curvature: of the names in `CURVATURES`; None for the part of the batch that all runs have.

    Returns:
      A loss is None where the run diverged: it is above a uniform guess of the byte, or NaN.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        key = row["key"]
        if key["split"] == "validation" and key.get("curvature") == curvature:
            place = found.setdefault(key["entrant"], {}).setdefault(
                key["batch"], {"learning_rate": key["learning_rate"], "losses": []}
            )
            place["losses"].append(row["loss"] if row["loss"] < math.log(256) else None)
    return found


def plot(found: dict[str, dict[str, Any]], context: int, path: Path) -> None:
    """Mean loss and range over seeds by the tokens of a step."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for name, by_batch in found.items():
        whole = {int(b): row["losses"] for b, row in by_batch.items() if None not in row["losses"]}
        tokens = [context * batch for batch in whole]
        line_over_seeds(axes, tokens, list(whole.values()), NAMES[name])
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens in a step", ylabel="validation loss, nats per byte")
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(config: BatchSizesConfig) -> None:
    """Runs what is missing and writes the table and the plot."""
    if config.quick:
        few = {"batches": (2,), "entrants": ("soap",), "tries": 1, "seeds": (0,), "steps": 4}
        config = replace(config, **few)
    origin = provenance("benchmarks.batch_sizes")
    journal = Journal(None if config.quick else config.runs)
    corpus = data.load("stdlib")
    for batch in config.batches:
        for name in config.entrants:
            enter(config, journal, corpus, batch, name)
        if batch in config.curvature_batches:
            vary_curvature(config, journal, corpus, batch)
    if config.quick:
        return
    found, model = summarize(journal.rows), REGIME.workload.run("adamw").model
    result = {
        **origin,
        "parameters": parameter_count(model),
        "context": model.context,
        "steps": config.steps,
        "tries": config.tries,
        "results": found,
        "curvatures": {name: summarize(journal.rows, name).get(CURVED, {}) for name in CURVATURES},
    }
    (RESULTS / "batch_sizes.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(found, model.context, RESULTS / "batch_sizes.png")


if __name__ == "__main__":
    main(tyro.cli(BatchSizesConfig))
