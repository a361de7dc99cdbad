"""A run's folder on disk: one writer at a time, whole files, and one sentence for what is wrong.

    run.json        the settings of the run and the fingerprint of its text
    metrics.jsonl   a line for each logged step and validation
    tuning.jsonl    of `tune`, a line for each try
    tokenizer.json  what a tokenizer learnt from the text
    checkpoints/    see `checkpoint`
    summary.json, *.png, tensorboard/
    lock            locked while a process writes here

Small files are written under a temporary name, synced and renamed: a reader sees the old content or
the new one, whenever the writer is killed.
"""

import contextlib
import json
import math
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jax

from .config import UsageError

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two writers apart
    fcntl = None

LOCK = "lock"
RECORD = "run.json"
METRICS = "metrics.jsonl"
TOKENIZER = "tokenizer.json"
SUMMARY = "summary.json"
TUNING = "tuning.jsonl"

Record = dict[str, Any]


# --- finding it -----------------------------------------------------------------------------------


def existing(out: str | None, purpose: str = "resume") -> Path:
    """The folder of a run that is to be continued or read.

    Args:
      out: where it is.
      purpose: what the run is needed for, in words.

    Raises:
      UsageError: there is none.
    """
    if out is None:
        raise UsageError("--resume needs the run's folder. Name it with --out.")
    folder = Path(out)
    with reading(folder):
        found = (folder / RECORD).is_file()
    if not found:
        instead = ", or leave out --resume" if purpose == "resume" else ""
        raise UsageError(f"{out} holds no run to {purpose}. Check --out{instead}.")
    return folder


def new(out: str | None, command: str) -> Path:
    """A new folder for results.

    Raises:
      UsageError: it holds something already, or cannot be made.
    """
    if out is None and jax.process_count() > 1:
        raise UsageError("Several processes need one folder. Name it with --out.")
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{command}"
    folder = Path(out) if out else Path("runs") / name
    if jax.process_index() != 0:
        return folder
    with reading(folder):
        taken = os.path.lexists(folder) and not (folder.is_dir() and is_unused(folder))
    if taken:
        kind = "exists already" if folder.exists() else "is a link to nothing"
        raise UsageError(f"{folder} {kind}. Choose another --out; nothing was overwritten.")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def is_unused(folder: Path) -> bool:
    """Whether a folder holds nothing, or what a process left that was killed before its run."""
    return all(p.name == LOCK or p.name.startswith(f".{RECORD}") for p in folder.iterdir())


@contextlib.contextmanager
def writer(folder: Path, *, resume: bool) -> Iterator[None]:
    """Inside, this process is the only one that writes to the folder.

    The operating system holds the lock, and drops it with the process, however that ends. Of
    several processes of a run, the first one holds it for all.

    Raises:
      UsageError: another process has it, or a new run's folder is no longer empty.
    """
    if jax.process_index() != 0:
        yield
        return
    path = folder / LOCK
    with writing(folder):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    with contextlib.closing(os.fdopen(descriptor, "r+", errors="replace")) as file:
        lock(file.fileno(), folder, owner=file.read(200).strip())
        if not resume and not is_unused(folder):
            raise UsageError(f"{folder} is in use. Choose another --out; nothing was overwritten.")
        with contextlib.suppress(OSError):  # it is only said to people, and the disk may be full
            os.ftruncate(descriptor, 0)
            text = f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%F %T}"
            os.pwrite(descriptor, text.encode(), 0)
        yield


def lock(descriptor: int, folder: Path, owner: str) -> None:
    """Takes the lock, or says who has it; a file system without locks is warned of."""
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"{folder} is being written to by another run ({owner or 'unknown'}). Wait for its "
            "end, stop it, or choose another --out."
        ) from None
    except OSError as error:
        print(
            f"Warning: {folder} is on a file system without locks ({error.strerror}). Do not start "
            "a second run there.",
            file=sys.stderr,
        )


# --- errors of the file system --------------------------------------------------------------------


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the file system refuses into one sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UsageError(f"{path} cannot be read ({reason}). Check the path.") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the file system refuses into one sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UsageError(
            f"{path} cannot be written ({reason}). Free some space, or choose another --out."
        ) from error


# --- small files ----------------------------------------------------------------------------------


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Has `write` make a file, under a temporary name with the same ending, and renames it.

    Raises:
      UsageError: the file system refuses; what was there stays.
    """
    with writing(path):
        descriptor, name = tempfile.mkstemp(path.suffix, f".{path.name}-", path.parent)
        os.close(descriptor)
        unfinished = Path(name)
        try:
            write(unfinished)
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            unfinished.chmod(0o666 & ~umask())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def umask() -> int:
    """The process's, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, content: Any) -> None:
    """Writes readable, strict JSON."""
    text = json.dumps(strict(content), indent=2, allow_nan=False)
    replace(path, lambda unfinished: unfinished.write_text(text + "\n"))


def strict(content: Any) -> Any:
    """JSON has no numbers that are not finite; they become null."""
    if isinstance(content, dict):
        return {key: strict(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [strict(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_json(path: Path) -> Record:
    """One JSON object.

    Raises:
      UsageError: the file is torn, or something else.
    """
    with reading(path):
        content = path.read_bytes()
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is damaged ({len(content)} bytes, and not the JSON that was written). "
            "Restore it from a copy, or start with another --out."
        ) from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds no JSON object. Check --out.")
    return found


# --- the log --------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[Record]:
    """The JSON objects of a file that has one in each line; what is torn is left out."""
    if not path.exists():
        return []
    with reading(path):
        lines = path.read_bytes().splitlines()
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                found.append(record)
    return found


def read_log(path: Path) -> list[Record]:
    """The whole lines of metrics.jsonl, in order."""
    return [record for record in read_lines(path) if isinstance(record.get("step"), int)]


def read_metrics(path: Path) -> dict[str, list[dict[str, float]]]:
    """The lines of metrics.jsonl by run; a null was a number that is not finite."""
    runs: dict[str, list[dict[str, float]]] = {}
    for record in read_log(path):
        name = record.pop("run", "")
        line = {key: math.nan if value is None else value for key, value in record.items()}
        runs.setdefault(name, []).append(line)
    return runs


def forget_lines_after(path: Path, steps: int, run: str | None = None) -> None:
    """Takes what came after `steps` steps out of the log: the resumed run logs it again."""
    records = read_log(path)
    kept = [
        record
        for record in records
        if (run is not None and record.get("run") != run)
        or record["step"] < steps + ("val_loss" in record)
    ]
    if path.exists() and (kept != records or not path.read_bytes().endswith(b"\n")):
        text = "".join(json.dumps(record) + "\n" for record in kept)
        replace(path, lambda unfinished: unfinished.write_text(text))


class Log:
    """metrics.jsonl, to which whole lines are appended; what a full disk refuses waits for room."""

    def __init__(self, path: Path):
        self.path = path
        self.waiting: list[str] = []

    def append(self, record: Record) -> None:
        """Writes the line, and those that are waiting; warns of the first that has to wait."""
        self.waiting.append(json.dumps(strict(record), allow_nan=False) + "\n")
        try:
            append_whole(self.path, "".join(self.waiting).encode())
            self.waiting.clear()
        except OSError as error:
            if len(self.waiting) == 1:
                print(
                    f"Warning: {self.path} cannot be written ({error.strerror}). The lines from "
                    f"step {record['step']} on are kept until it can be.",
                    file=sys.stderr,
                )

    def close(self) -> None:
        """Says how many lines never reached the disk."""
        if self.waiting:
            print(f"Warning: {self.path} lacks {len(self.waiting)} line(s).", file=sys.stderr)


def append_whole(path: Path, content: bytes) -> None:
    """Appends all of the lines or nothing, after a line that a killed process tore as well."""
    with path.open("ab+", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        if before:
            file.seek(before - 1)
            content = content if file.read(1) == b"\n" else b"\n" + content
        try:
            rest = memoryview(content)
            while rest:  # a disk with too little room takes a part, and then raises
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(before)
            raise
