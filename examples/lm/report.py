"""What the user sees of a run: the progress bar, the table, the files."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tensorboardX import SummaryWriter

from examples.lm.config import UsageError
from examples.lm.loop import Result


def read_metrics(path: Path) -> dict[str, list[dict[str, float]]]:
    """The lines of metrics.jsonl by run."""
    runs: dict[str, list[dict[str, float]]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        runs.setdefault(record.pop("run"), []).append(record)
    return runs


def folder_of(out: str | None) -> Path:
    """The folder of a run that is to be continued."""
    if out is None:
        raise UsageError("--resume needs the run's folder. Name it with --out.")
    if not (Path(out) / "run.json").is_file():
        raise UsageError(f"{out} holds no run to resume. Check --out, or leave out --resume.")
    return Path(out)


def new_folder(out: str | None, command: str) -> Path:
    """A new folder for the results; one that holds something already is refused."""
    if out is None and jax.process_count() > 1:
        raise UsageError("Several processes need one folder. Name it with --out.")
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{command}"
    folder = Path(out) if out else Path("runs") / name
    if jax.process_index() != 0:
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists already. Choose another --out; nothing was overwritten.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def progress_bar(console: Console) -> Progress:
    """A line for each run: loss, win rate, speed, share of the chips' peak, time left."""
    return Progress(
        TextColumn("{task.description:>9}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("win {task.fields[win]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=console,
        disable=jax.process_index() != 0,
    )


def tracker(
    progress: Progress, name: str, steps: int, path: Path, closing: contextlib.ExitStack
) -> Callable[[dict[str, float]], None]:
    """A run's log function: metrics.jsonl, TensorBoard and a move of the progress bar.

    What it opens is closed with `closing`.
    """
    if jax.process_index() != 0:
        return lambda record: None
    board = closing.enter_context(SummaryWriter(str(path.parent / "tensorboard" / name)))
    empty = {"loss": float("nan"), "win": "   -", "speed": ""}
    task = progress.add_task(name, total=steps, **empty)

    def log(record: dict[str, float]) -> None:
        for key in record.keys() - {"step"}:
            board.add_scalar(key, record[key], record["step"])
        board.flush()
        with path.open("a") as file:
            file.write(json.dumps({"run": name, **record}) + "\n")
        if "loss" in record:
            win = f"{record['win_rate']:4.2f}" if "win_rate" in record else "   -"
            speed = f"{record['tokens_per_second'] / 1e3:5.1f}k tokens/s"
            speed += f", MFU {100 * record['mfu']:.1f} %" if "mfu" in record else ""
            progress.update(
                task, completed=record["step"] + 1, loss=record["loss"], win=win, speed=speed
            )

    return log


def summary(result: Result) -> dict[str, Any]:
    """A run in a few numbers."""
    return {
        "validation_loss": result.validation_loss,
        "step_seconds": result.step_seconds,
        "curvature_share": result.curvature_share,
        "win_rate": result.win_rate,
        "steps": result.steps,
        "peak_bytes": result.peak_bytes,
    }


def table(summaries: dict[str, dict[str, Any]], bigram_loss: float | None) -> Table:
    """The runs side by side."""
    out = Table(title="validation loss in nats a token")
    out.add_column("optimizer")
    for column in ("validation loss", "step time", "on curvature", "win rate"):
        out.add_column(column, justify="right")
    for name, row in summaries.items():
        win_rate = "-" if row["win_rate"] is None else f"{row['win_rate']:.2f}"
        out.add_row(
            name,
            f"{row['validation_loss']:.4f}",
            f"{1e3 * row['step_seconds']:.1f} ms",
            f"{100 * row['curvature_share']:.1f} %",
            win_rate,
        )
    if bigram_loss is not None:
        out.add_section()
        out.add_row("bigram counts", f"{bigram_loss:.4f}", "-", "-", "-", style="dim")
    return out


def write_json(path: Path, content: Any) -> None:
    """Writes readable JSON."""
    path.write_text(json.dumps(content, indent=2, default=dataclasses.asdict) + "\n")
