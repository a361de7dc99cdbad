"""The runs behind the two commands: one optimizer, or several on the same batches."""

import contextlib
import dataclasses
import sys
from pathlib import Path

import jax
from rich.console import Console

from examples.lm import data, hosts, plot, report
from examples.lm.checkpoint import Checkpoints
from examples.lm.config import (
    MODELS,
    CompareConfig,
    RunConfig,
    TrainConfig,
    check_numbers,
    for_optimizer,
    lookup,
    model_config,
)
from examples.lm.loop import Result, fit
from examples.lm.mesh import make_mesh
from examples.lm.optimizers import OPTIMIZERS, SECOND_ORDER, hyperparameters
from examples.lm.train import check


def compare(config: CompareConfig) -> None:
    """Trains each optimizer in turn, prints the table, writes plot, metrics and summary."""
    for name in config.optimizers:
        lookup(OPTIMIZERS, name, "optimizer")
    run(config, {name: for_optimizer(config, name) for name in config.optimizers}, "compare")


def train(config: TrainConfig) -> None:
    """Trains one model with one optimizer, or continues where it stopped."""
    lookup(OPTIMIZERS, config.optimizer, "optimizer")
    run(config, {config.optimizer: config}, "train")


def run(config: RunConfig, runs: dict[str, TrainConfig], command: str) -> None:
    """Trains the runs one after another and reports on them together."""
    hosts.join(config.hosts, agree=command == "train")
    for run_config in runs.values():
        check_numbers(run_config)
        check(run_config, make_mesh(run_config.mesh))
    lookup(MODELS, config.model, "model")
    corpus = data.load(config.data, config.tokenizer)
    data.check_length(corpus, model_config(config, corpus.vocab_size).context)
    resume = isinstance(config, TrainConfig) and config.resume
    folder = report.folder_of(config.out) if resume else report.new_folder(config.out, command)
    # A terminal narrower than the table would cut numbers off; a file has no width at all.
    width = None if sys.stdout.isatty() else 100
    console = Console(width=width, quiet=jax.process_index() != 0)
    describe(console, config, runs, corpus, folder)
    again = f"--resume --out {folder}" if command == "train" else "another --out"
    with hosts.last_words(
        "Stopped: this process or another one of the run died; the lines above say which. Start "
        f"all of them again with {again}."
    ):
        results = train_all(console, runs, corpus, folder, checkpoints=command == "train")
    if any(result.steps < runs[name].steps for name, result in results.items()):
        (result,) = results.values()
        console.print(f"Stopped after step {result.steps}. Continue: --resume --out {folder}")
    elif jax.process_index() == 0:
        write_summary(console, config, runs, results, corpus, folder)


def describe(
    console: Console,
    config: RunConfig,
    runs: dict[str, TrainConfig],
    corpus: data.Corpus,
    folder: Path,
) -> None:
    """Says what is about to run."""
    size = "streamed" if corpus.windows else f"{len(corpus.train):,} training tokens"
    console.print(f"{config.data}: {size}; results in {folder}", highlight=False)
    for name in runs:
        if config.attention != "xla" and OPTIMIZERS[name].extra_args in SECOND_ORDER:
            console.print(
                f"{name} takes its curvature through XLA's attention, not {config.attention}'s, "
                "which has no second derivative."
            )


def train_all(
    console: Console,
    runs: dict[str, TrainConfig],
    corpus: data.Corpus,
    folder: Path,
    checkpoints: bool,
) -> dict[str, Result]:
    """The runs' results, up to where SIGTERM ended one that has checkpoints."""
    results = {}
    termination = hosts.termination() if checkpoints else contextlib.nullcontext()
    with (
        report.progress_bar(console) as progress,
        termination as stop,
        contextlib.ExitStack() as closing,
    ):
        for name, config in runs.items():
            store = Checkpoints(folder, config) if stop else None
            if store and config.resume:
                store.check_same_run()
            elif store:
                store.describe()
            log = report.tracker(progress, name, config.steps, folder / "metrics.jsonl", closing)
            results[name] = fit(config, corpus, log=log, store=store, stop=stop)
            if store:
                store.close()
    return results


def write_summary(
    console: Console,
    config: RunConfig,
    runs: dict[str, TrainConfig],
    results: dict[str, Result],
    corpus: data.Corpus,
    folder: Path,
) -> None:
    """Leaves the pictures and summary.json, and prints the table."""
    bigram_loss = data.bigram_loss(corpus, corpus.validation)
    summaries = {name: report.summary(result) for name, result in results.items()}
    metrics = report.read_metrics(folder / "metrics.jsonl")
    plot.losses(metrics, folder / "loss.png", bigram_loss)
    plot.curvature(metrics, folder)
    report.write_json(
        folder / "summary.json",
        {
            "config": dataclasses.asdict(config),
            "hyperparameters": {n: dataclasses.asdict(hyperparameters(c)) for n, c in runs.items()},
            "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
            "context": MODELS[config.model].context,
            "bigram_loss": bigram_loss,
            "runs": summaries,
        },
    )
    console.print(report.table(summaries, bigram_loss))
