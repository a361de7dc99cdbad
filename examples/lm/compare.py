"""The runs behind the two commands: one optimizer, or several on the same batches."""

import dataclasses
import sys
from typing import Any

from rich.console import Console

from examples.lm import data, plot, report
from examples.lm.config import CompareConfig, TrainConfig, for_optimizer
from examples.lm.optimizers import OPTIMIZERS, hyperparameters, lookup
from examples.lm.train import fit


def compare(config: CompareConfig) -> None:
    """Trains each optimizer in turn, prints the table, writes plot, metrics and summary."""
    for name in config.optimizers:
        lookup(OPTIMIZERS, name, "optimizer")
    run(config, {name: for_optimizer(config, name) for name in config.optimizers}, "compare")


def train(config: TrainConfig) -> None:
    """Trains one model with one optimizer."""
    lookup(OPTIMIZERS, config.optimizer, "optimizer")
    run(config, {config.optimizer: config}, "train")


def run(config: Any, runs: dict[str, TrainConfig], command: str) -> None:
    """Trains the runs one after another and reports on them together."""
    corpus = data.load(config.data)
    folder = report.output_folder(config.out, command)
    # A terminal narrower than the table would cut numbers off; a file has no width at all.
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(
        f"{config.data}: {len(corpus.train):,} training tokens; results in {folder}",
        highlight=False,
    )
    results = {}
    with report.progress_bar(console) as progress:
        for name, run_config in runs.items():
            log = report.tracker(progress, name, run_config.steps, folder / "metrics.jsonl")
            results[name] = fit(run_config, corpus, log=log)
    bigram_loss = data.bigram_loss(corpus, corpus.validation)
    summaries = {name: report.summary(result) for name, result in results.items()}
    records = {name: result.records for name, result in results.items()}
    plot.losses(records, folder / "loss.png", bigram_loss)
    report.write_json(
        folder / "summary.json",
        {
            "config": dataclasses.asdict(config),
            "hyperparameters": {n: dataclasses.asdict(hyperparameters(c)) for n, c in runs.items()},
            "bigram_loss": bigram_loss,
            "runs": summaries,
        },
    )
    console.print(report.table(summaries, bigram_loss))
