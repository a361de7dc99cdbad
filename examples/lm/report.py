"""What the user sees of a run: the progress bar, the table, the files."""

import contextlib
import dataclasses
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from . import run_folder
from .config import TrainConfig, UsageError
from .loop import Result


def progress_bar(console: Console) -> Progress:
    """A line for each run: losses, win rate, speed, time left. Shown on a terminal only."""
    return Progress(
        TextColumn("{task.description:>9}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
        console=console,
        disable=jax.process_index() != 0 or not console.is_terminal,
    )


class Board:
    """TensorBoard's event file. It lacks what the disk refuses; metrics.jsonl gets that later."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.writer: EventsWriter | None = None
        self.files = 0

    def add(self, record: dict[str, float]) -> None:
        """Writes a line's numbers, in this thread: tensorboardX's own hangs after an error."""
        values = [
            Summary.Value(tag=key, simple_value=record[key]) for key in record if key != "step"
        ]
        event = Event(
            step=int(record["step"]), wall_time=time.time(), summary=Summary(value=values)
        )
        try:
            if self.writer is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.writer = EventsWriter(str(self.folder / "events"), f".{self.files}")
                self.files += 1
            self.writer.write_event(event)
            self.writer.flush()
        except OSError:  # the file may be torn, and is not written to again
            self.close()

    def close(self) -> None:
        """Closes the file; a later line begins another one."""
        writer, self.writer = self.writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()


def check_wandb(project: str | None) -> None:
    """Tells the user at the start if Weights & Biases is asked for and not installed."""
    if project is not None:
        try:
            importlib.import_module("wandb")
        except ImportError as error:
            raise UsageError("--wandb needs the package wandb: pip install wandb.") from error


class WandbRun:
    """A run in Weights & Biases, which a resumed run goes on with: its id is kept in the folder."""

    def __init__(self, folder: Path, name: str, config: TrainConfig):
        kept = folder / f"wandb-{name}.json"
        number = run_folder.read_json(kept)["id"] if config.resume and kept.exists() else None
        try:
            self.run = importlib.import_module("wandb").init(
                project=config.wandb,
                name=f"{folder.name}-{name}",
                id=number,
                resume=None if number is None else "allow",
                dir=str(folder),
                config=dataclasses.asdict(config),
            )
        except Exception as error:  # the network's, the service's and the package's own
            reason = (str(error).splitlines() or [""])[0].rstrip(".")
            raise UsageError(
                f"Weights & Biases did not start ({type(error).__name__}: {reason}). Log in with "
                "`wandb login`, set WANDB_MODE=offline, or leave out --wandb."
            ) from error
        run_folder.write_json(kept, {"id": self.run.id})

    def add(self, record: dict[str, float]) -> None:
        """Sends a line's numbers."""
        values = {key: value for key, value in record.items() if key != "step"}
        self.run.log(values, step=int(record["step"]))

    def close(self) -> None:
        """Sends the rest."""
        self.run.finish()


class Profiler:
    """Records some steps, once the first ones have compiled, for TensorBoard and Perfetto.

    Args:
      folder: where the trace goes.
      steps: how many are recorded; 0 records none.
    """

    COMPILING = 2  # steps that are taken before

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps, self.recording = folder, steps, False
        self.started = False

    def turns(self, taken: int) -> bool:
        """Whether it starts or ends before the next step; that takes seconds."""
        return self.steps > 0 and taken in (self.COMPILING, self.COMPILING + self.steps)

    def before(self, taken: int) -> None:
        """Starts before the first step to record, and ends before the one after the last."""
        if self.steps and taken == self.COMPILING:
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self.recording = self.started = True
        elif taken == self.COMPILING + self.steps:
            self.close()

    def close(self) -> None:
        """Writes what has been recorded, and says where there was nothing to record."""
        if self.recording:
            self.recording = False
            jax.profiler.stop_trace()
        elif self.steps and not self.started:
            print(f"No step was profiled: it begins after {self.COMPILING} steps.")


def tracker(
    progress: Progress, name: str, config: TrainConfig, path: Path, closing: contextlib.ExitStack
) -> Callable[[dict[str, float]], None]:
    """A run's log function: metrics.jsonl, TensorBoard, and a move of the progress bar.

    With `--wandb` it also sends the lines there.

    Without a terminal, as in a pipe or a file, it prints lines instead of the bar. What it opens is
    closed with `closing`.
    """
    if jax.process_index() != 0:
        return lambda record: None
    steps = config.steps
    boards: list[Board | WandbRun] = [Board(path.parent / "tensorboard" / name)]
    if config.wandb is not None:
        boards.append(WandbRun(path.parent, name, config))
    for board in boards:
        closing.enter_context(contextlib.closing(board))
    lines = closing.enter_context(contextlib.closing(run_folder.Log(path)))
    task = progress.add_task(name, total=steps, shown="compiling")
    console, digits = progress.console, len(str(steps))
    validation = ""

    def log(record: dict[str, float]) -> None:
        nonlocal validation
        for board in boards:
            board.add(record)
        lines.append({"run": name, **record})
        if "val_loss" in record:
            validation = f"  val {record['val_loss']:.3f}"
            done, shown = int(record["step"]), validation.strip()
        else:
            done, shown = int(record["step"]) + 1, training_line(record) + validation
        if "val_loss" not in record:
            progress.update(task, completed=done, shown=shown)
        if not console.is_terminal:
            console.print(f"{name} {done:>{digits}}/{steps}  {shown}", highlight=False)

    return log


def training_line(record: dict[str, float]) -> str:
    """A step's numbers: loss, win rate, speed, share of the chips' peak."""
    parts = [f"loss {record['loss']:.3f}"]
    if "win_rate" in record:
        parts.append(f"win rate {record['win_rate']:.2f}")
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second'] / 1e3:.1f}k tokens/s")
    if "mfu" in record:
        parts.append(f"MFU {100 * record['mfu']:.1f} %")
    return "  ".join(parts)


def summary(result: Result, records: list[dict[str, float]]) -> dict[str, Any]:
    """A run in a few numbers; `records` are all of its lines, from before it was resumed too."""
    rates = [record["win_rate"] for record in records if "win_rate" in record]
    return {
        "validation_loss": result.validation_loss,
        "step_seconds": result.step_seconds,
        "curvature_share": result.curvature_share,
        "win_rate": sum(rates) / len(rates) if rates else None,
        "steps": result.steps,
        "diverged": result.diverged,
        "peak_bytes": result.peak_bytes,
    }


def measured(folder: Path, name: str) -> dict[str, Any]:
    """A run's times and memory in the summary that is there already, if it is whole."""
    try:
        row = run_folder.read_json(folder / run_folder.SUMMARY)["runs"][name]
        names = ("step_seconds", "curvature_share", "peak_bytes")
        return {key: row[key] for key in names if isinstance(row[key], (float, int))}
    except (UsageError, KeyError, TypeError):
        return {}


def table(summaries: dict[str, dict[str, Any]], bigram_loss: float | None) -> Table:
    """The runs side by side."""
    out = Table(title="validation loss in nats a token")
    out.add_column("optimizer")
    for column in ("steps", "validation loss", "step time", "on curvature", "win rate"):
        out.add_column(column, justify="right")
    for name, row in summaries.items():
        loss = f"{row['validation_loss']:.4f}"
        win_rate = "-" if row["win_rate"] is None else f"{row['win_rate']:.2f}"
        out.add_row(
            name,
            f"{row['steps']}",
            loss if row["diverged"] is None else f"diverged at step {row['diverged']}",
            f"{1e3 * row['step_seconds']:.1f} ms",
            f"{100 * row['curvature_share']:.1f} %",
            win_rate,
        )
    if bigram_loss is not None:
        out.add_section()
        out.add_row("bigram counts", "-", f"{bigram_loss:.4f}", "-", "-", "-", style="dim")
    return out


def best(summaries: dict[str, dict[str, Any]]) -> str | None:
    """The run with the lowest validation loss; None if all diverged."""
    losses = {n: row["validation_loss"] for n, row in summaries.items() if row["diverged"] is None}
    return min(losses, key=lambda name: losses[name], default=None)


def verdict(summaries: dict[str, dict[str, Any]]) -> str:
    """What the table says: the best run, and what half of the steps were enough for."""
    first = best(summaries)
    if first is None:
        return "Every run diverged; the warnings above say where, and what to try."
    loss = summaries[first]["validation_loss"]
    others = {name: row for name, row in summaries.items() if name != first}
    second = best(others)
    if second is None:
        return f"{first} ends at a validation loss of {loss:.4f} nats a token."
    margin = others[second]["validation_loss"] - loss
    said = [f"{first} ends lowest, at {loss:.4f} nats a token: {margin:.4f} below {second}."]
    baseline, row = next(iter(summaries.items()))
    for name, shorter in summaries.items():
        diverged = row["diverged"] is not None or shorter["diverged"] is not None
        if diverged or shorter["steps"] >= row["steps"]:
            continue
        margin = row["validation_loss"] - shorter["validation_loss"]
        said.append(
            f"{name} ends {abs(margin):.4f} {'below' if margin > 0 else 'above'} {baseline}, "
            f"after {shorter['steps']} steps instead of {row['steps']}."
        )
    return " ".join(said)


def written(folder: Path) -> str:
    """What a run leaves, and where."""
    names = ["loss.png", "win_rate.png", "gamma.png", run_folder.METRICS, run_folder.SUMMARY]
    names += ["tensorboard", "profile", "checkpoints"]
    found = ", ".join(name for name in names if (folder / name).exists())
    return f"Written to {folder}: {found}"
