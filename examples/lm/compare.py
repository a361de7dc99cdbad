"""The runs behind the two commands: one optimizer, or several on the same batches."""

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator

import jax
from rich.console import Console

from examples.lm import data, plot, report
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
from examples.lm.mesh import join_processes, make_mesh
from examples.lm.optimizers import OPTIMIZERS, hyperparameters
from examples.lm.train import check, fit


def compare(config: CompareConfig) -> None:
    """Trains each optimizer in turn, prints the table, writes plot, metrics and summary."""
    for name in config.optimizers:
        lookup(OPTIMIZERS, name, "optimizer")
    run(config, {name: for_optimizer(config, name) for name in config.optimizers}, "compare")


def train(config: TrainConfig) -> None:
    """Trains one model with one optimizer, or continues where it stopped."""
    lookup(OPTIMIZERS, config.optimizer, "optimizer")
    run(config, {config.optimizer: config}, "train")


@contextlib.contextmanager
def termination() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGTERM has come since."""
    asked = []
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, before)


def run(config: RunConfig, runs: dict[str, TrainConfig], command: str) -> None:
    """Trains the runs one after another and reports on them together."""
    join_processes(config.hosts)
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
    console.print(
        f"{config.data}: {len(corpus.train):,} training tokens; results in {folder}",
        highlight=False,
    )
    results = {}
    stopping = termination() if command == "train" else contextlib.nullcontext(lambda: False)
    with (
        report.progress_bar(console) as progress,
        stopping as terminated,
        contextlib.ExitStack() as closing,
    ):
        for name, run_config in runs.items():
            log = report.tracker(
                progress, name, run_config.steps, folder / "metrics.jsonl", closing
            )
            store = Checkpoints(folder, run_config) if command == "train" else None
            if store is None:
                results[name] = fit(run_config, corpus, log=log)
                continue
            if resume:
                store.check_same_run()
            else:
                store.describe()
            results[name] = fit(run_config, corpus, log=log, store=store, stop=terminated)
            store.close()
    if terminated():
        (result,) = results.values()
        console.print(f"Stopped after step {result.steps}. Continue: --resume --out {folder}")
        return
    if jax.process_index() != 0:
        return
    bigram_loss = data.bigram_loss(corpus, corpus.validation)
    summaries = {name: report.summary(result) for name, result in results.items()}
    plot.losses(report.read_metrics(folder / "metrics.jsonl"), folder / "loss.png", bigram_loss)
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
