"""The runs behind the two commands: one optimizer, or several on the same batches."""

import contextlib
import dataclasses
import sys
from pathlib import Path

import jax
from rich.console import Console

from examples.lm import data, hosts, plot, report
from examples.lm.checkpoint import Checkpoints
from examples.lm.config import CompareConfig, RunConfig, TrainConfig, for_optimizer
from examples.lm.loop import Result, fit
from examples.lm.run import Run, resolve


def compare(config: CompareConfig) -> None:
    """Trains each optimizer in turn, prints the table, writes plot, metrics and summary."""
    configs = {name: for_optimizer(config, name) for name in config.optimizers}
    train_and_report(config, configs, "compare")


def train(config: TrainConfig) -> None:
    """Trains one model with one optimizer, or continues where it stopped."""
    train_and_report(config, {config.optimizer: config}, "train")


def train_and_report(config: RunConfig, configs: dict[str, TrainConfig], command: str) -> None:
    """Trains the runs one after another and reports on them together."""
    hosts.join(config.hosts, agree=command == "train")
    runs = {name: resolve(of_run) for name, of_run in configs.items()}
    corpus = data.load(config.data, config.tokenizer)
    runs = {name: run.with_vocabulary(corpus.vocab_size) for name, run in runs.items()}
    data.check_length(corpus, next(iter(runs.values())).model.context)
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
    if any(result.steps < config.steps for result in results.values()):
        (result,) = results.values()
        console.print(f"Stopped after step {result.steps}. Continue: --resume --out {folder}")
    elif jax.process_index() == 0:
        write_summary(console, config, runs, results, corpus, folder)


def describe(
    console: Console,
    config: RunConfig,
    runs: dict[str, Run],
    corpus: data.Corpus,
    folder: Path,
) -> None:
    """Says what is about to run."""
    size = "streamed" if corpus.windows else f"{len(corpus.train):,} training tokens"
    console.print(f"{config.data}: {size}; results in {folder}", highlight=False)
    for name, run in runs.items():
        curvature = run.optimizer.curvature
        if config.attention != "xla" and curvature and curvature.second_order:
            console.print(
                f"{name} takes its curvature through XLA's attention, not {config.attention}'s, "
                "which has no second derivative."
            )


def train_all(
    console: Console,
    runs: dict[str, Run],
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
        for name, run in runs.items():
            store = Checkpoints(folder, run.config) if stop else None
            if store and run.config.resume:
                store.check_same_run()
            elif store:
                store.describe()
            log = report.tracker(
                progress, name, run.config.steps, folder / "metrics.jsonl", closing
            )
            results[name] = fit(run, corpus, log=log, store=store, stop=stop)
            if store:
                store.close()
    return results


def write_summary(
    console: Console,
    config: RunConfig,
    runs: dict[str, Run],
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
            "hyperparameters": {
                name: dataclasses.asdict(run.hyperparameters) for name, run in runs.items()
            },
            "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
            "context": next(iter(runs.values())).model.context,
            "bigram_loss": bigram_loss,
            "runs": summaries,
        },
    )
    console.print(report.table(summaries, bigram_loss))
