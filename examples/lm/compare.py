"""The runs behind the two commands: one optimizer, or several on the same batches."""

import contextlib
import dataclasses
import sys
from pathlib import Path

import jax
from rich.console import Console

from . import data, generate, hosts, memory, optimizers, plot, record, report, run_folder, timing
from .checkpoint import Checkpoints
from .config import CompareConfig, LoopConfig, TrainConfig, compared
from .loop import Result, fit
from .run import Run
from .train import Trainer

MANY_PASSES = 20  # over the training text, after which a model may know it by heart
SAMPLE = 64  # tokens of held-out text that a sample begins with, and that are added


def compare(config: CompareConfig) -> None:
    """Trains each optimizer in turn, prints the table, writes plot, metrics and summary."""
    train_and_report(config, compared(config), "compare")


def train(config: TrainConfig) -> None:
    """Trains one model with one optimizer, or continues where it stopped."""
    if not config.resume:  # a run from before this was refused goes on with what it has recorded
        optimizers.check_used(config, [config.optimizer])
    train_and_report(config, {config.optimizer: config}, "train")


def train_and_report(config: LoopConfig, configs: dict[str, TrainConfig], command: str) -> None:
    """Trains the runs one after another and reports on them together."""
    report.check_wandb(config.wandb)
    with record.started(config, configs, command) as (folder, runs, corpus, again):
        # A terminal narrower than the table would cut numbers off; a file has no width at all.
        width = None if sys.stdout.isatty() else 100
        console = Console(
            width=width, quiet=jax.process_index() != 0, soft_wrap=True, markup=False, emoji=False
        )
        describe(console, config, runs, corpus, folder)
        results = train_all(console, runs, corpus, folder)
        stopped = [r for name, r in results.items() if not ended(runs[name], r)]
        if stopped:
            console.print(f"Stopped after step {stopped[0].steps}. Continue: {again}")
        elif jax.process_index() == 0:
            finish(console, config, runs, results, corpus, folder)


def describe(
    console: Console,
    config: LoopConfig,
    runs: dict[str, Run],
    corpus: data.Corpus,
    folder: Path,
) -> None:
    """Says what is about to run."""
    size = "streamed" if corpus.windows else f"{len(corpus.train):,} training tokens"
    console.print(f"{config.data}: {size}; results in {folder}", highlight=False)
    context = next(iter(runs.values())).model.context
    read = config.steps * config.batch_size * context
    if not corpus.windows and read > MANY_PASSES * len(corpus.train):
        console.print(
            f"The run reads that text {read // len(corpus.train)} times, so the validation loss "
            "may rise again. Take fewer --steps, more text, or --dropout 0.1.",
            highlight=False,
        )
    for name, run in runs.items():
        curvature = run.optimizer.curvature
        if config.attention != "xla" and curvature and curvature.second_order:
            console.print(
                f"{name} takes its curvature through XLA's attention, not {config.attention}'s, "
                "which has no second derivative."
            )


def train_all(
    console: Console, runs: dict[str, Run], corpus: data.Corpus, folder: Path
) -> dict[str, Result]:
    """The runs' results, up to the one that a signal ended."""
    results: dict[str, Result] = {}
    with (
        report.progress_bar(console) as progress,
        hosts.termination() as stop,
        contextlib.ExitStack() as closing,
    ):
        trainers = {}
        for name, run in runs.items():
            alone = len(runs) == 1
            store = Checkpoints(folder, run.config, run="" if alone else name)
            log = report.tracker(progress, name, run.config, folder / run_folder.METRICS, closing)
            trainers[name] = Trainer(run)
            profile = report.Profiler(folder / "profile" / name, run.config.profile)
            with (
                memory.enough(trainers[name]),
                contextlib.closing(store),
                contextlib.closing(profile),
            ):
                result = fit(
                    run,
                    corpus,
                    trainer=trainers[name],
                    log=log,
                    store=store,
                    stop=stop,
                    profile=profile,
                )
            results[name] = result
            if not ended(run, result):
                return results
        if len(runs) > 1:
            # One measurement for each optimizer, however many runs it has.
            timed = {run.config.optimizer: trainers[name] for name, run in runs.items()}
            times = timing.in_turns(timed, corpus)
            for name, run in runs.items():
                results[name].seconds, results[name].refreshed = times[run.config.optimizer]
    return results


def ended(run: Run, result: Result) -> bool:
    """Whether a run took its last step, or diverged."""
    return result.diverged is not None or result.steps == run.config.steps


def finish(
    console: Console,
    config: LoopConfig,
    runs: dict[str, Run],
    results: dict[str, Result],
    corpus: data.Corpus,
    folder: Path,
) -> None:
    """Prints the table and what it says, leaves the pictures and summary.json, shows a sample."""
    bigram_loss = data.bigram_loss(corpus, corpus.validation)
    metrics = run_folder.read_metrics(folder / run_folder.METRICS)
    summaries = {
        name: report.summary(result, metrics.get(name, [])) for name, result in results.items()
    }
    for name, result in results.items():
        if not result.seconds:  # all of its steps were taken before
            summaries[name] |= report.measured(folder, name)
    console.print(report.table(summaries, bigram_loss))
    console.print(report.verdict(summaries), highlight=False)
    run_folder.write_json(
        folder / run_folder.SUMMARY,
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
    plot.losses(metrics, folder / "loss.png", bigram_loss)
    plot.curvature(metrics, folder)
    console.print(report.written(folder), highlight=False)
    name = report.best(summaries)
    if name is not None and corpus.codec is not None and jax.process_count() == 1:
        settings = generate.GenerateConfig(str(folder), tokens=SAMPLE)
        prompt = corpus.codec.decode(corpus.validation[:SAMPLE].tolist()).encode()
        alone = len(runs) == 1
        text = generate.text_after(
            prompt, runs[name].config, corpus.codec, settings, "" if alone else name
        )
        if text is not None:
            console.print(f"A sample from {name}:", highlight=False)
            console.print(text, highlight=False, markup=False)
