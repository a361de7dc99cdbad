"""The run's folder on disk: one writer, whole files, one sentence for what is wrong with it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from examples.lm import run_folder
from examples.lm.config import UsageError

ROOT = Path(__file__).parents[2]

HOLD = """
import sys, time
from pathlib import Path
from examples.lm import run_folder
with run_folder.writer(Path(sys.argv[1]), resume=True):
    print("locked", flush=True)
    time.sleep(60)
"""


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- one writer -----------------------------------------------------------------------------------


def refusal(folder, resume=False):
    """What another writer is told."""
    with pytest.raises(UsageError) as raised, run_folder.writer(folder, resume=resume):
        pass
    return str(raised.value)


def test_a_second_writer_gets_one_sentence_and_the_folder_is_free_after_the_first(tmp_path):
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with run_folder.writer(tmp_path, resume=False):
        assert refusal(tmp_path).startswith(
            f"{tmp_path} is being written to by another run (process {os.getpid()} on "
        )
    with run_folder.writer(tmp_path, resume=False):
        pass
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.name != "lock"} == before


def test_a_killed_writer_leaves_no_lock(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        assert f"process {holder.pid} on" in refusal(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
        with run_folder.writer(tmp_path, resume=True):
            pass
    finally:
        holder.kill()


def test_of_two_new_runs_in_one_folder_the_later_one_is_refused(tmp_path):
    folders = [run_folder.new(str(tmp_path / "both"), "train") for _ in range(2)]
    with run_folder.writer(folders[0], resume=False):
        run_folder.write_json(folders[0] / run_folder.RECORD, {"steps": 1})
    assert "in use" in refusal(folders[1])


def test_a_file_system_without_locks_is_warned_of_and_used(tmp_path, monkeypatch, capsys):
    def refuse(descriptor, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    with run_folder.writer(tmp_path, resume=False):
        pass
    assert "without locks" in capsys.readouterr().err


# --- its name -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["with spaces", "lr=[0.1]", "ünïcödé ∂", "a*b?", "deep/er/est"])
def test_a_folder_may_have_any_name(name, tmp_path):
    folder = run_folder.new(str(tmp_path / name), "train")
    assert folder.is_dir()
    with run_folder.writer(folder, resume=False):
        run_folder.write_json(folder / run_folder.RECORD, {"steps": 1})
    assert run_folder.existing(str(folder)) == folder


def test_a_folder_that_cannot_be_made_is_said_with_the_reason(tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, reason in {
        "file": "exists already",
        "file/below": "Not a directory",
        "x" * 300: "name too long",
        "dangling": "link to nothing",
        "/proc/run": "No such file|not permitted",  # nothing can be written there
    }.items():
        with pytest.raises(UsageError, match=reason) as raised:
            run_folder.new(str(tmp_path / name), "train")
        assert len(str(raised.value).splitlines()) == 1
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("name", ["file/below", "x" * 300, "nowhere", "dangling"])
def test_a_run_to_continue_that_is_not_there_is_said(name, tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"holds no run to resume|cannot be read"):
        run_folder.existing(str(tmp_path / name))


# --- whole files ----------------------------------------------------------------------------------


def test_a_small_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    run_folder.write_json(path, {"steps": 1})

    def fail(unfinished):
        unfinished.write_text('{"ste')
        raise OSError(28, "No space left on device")

    with pytest.raises(UsageError, match=r"run\.json cannot be written \(No space left"):
        run_folder.replace(path, fail)
    assert json.loads(path.read_text()) == {"steps": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    path = tmp_path / "summary.json"
    run_folder.write_json(path, {"loss": float("nan"), "rates": (1.0, float("inf"))})
    assert json.loads(path.read_text()) == {"loss": None, "rates": [1.0, None]}


@pytest.mark.parametrize(
    "content", [b"", b'{"steps": 1', b"\0" * 100, b"\xff\xfe", b"[1, 2]", b"[" * 100_000]
)
def test_a_torn_json_file_is_one_sentence(content, tmp_path):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"run\.json") as raised:
        run_folder.read_json(path)
    assert len(str(raised.value).splitlines()) == 1


# --- the log --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "torn", [b'{"run": "a", "step": 2, "lo', b"\0\0\0", b"\xff\xfe", b"7", b'{"run": "a"}', b"\n\n"]
)
def test_a_torn_line_is_left_out_of_the_log(torn, tmp_path):
    path, log = tmp_path / "metrics.jsonl", run_folder.Log(tmp_path / "metrics.jsonl")
    for step in range(2):
        log.append({"run": "a", "step": step, "loss": float("nan")})
    path.write_bytes(path.read_bytes() + torn)
    (found,) = run_folder.read_metrics(path).values()
    assert [line["step"] for line in found] == [0, 1]
    run_folder.forget_lines_after(path, 1)
    log.append({"run": "a", "step": 1, "loss": 3.0})
    assert lines(path) == [
        {"run": "a", "step": 0, "loss": None},
        {"run": "a", "step": 1, "loss": 3.0},
    ]


def test_only_the_resumed_runs_lines_are_forgotten(tmp_path):
    log = run_folder.Log(tmp_path / "metrics.jsonl")
    for run in ("a", "b"):
        for step in range(3):
            log.append({"run": run, "step": step, "loss": 1.0})
    log.append({"run": "b", "step": 2, "val_loss": 1.0})
    run_folder.forget_lines_after(log.path, 2, "b")
    found = [(line["run"], line["step"], "val_loss" in line) for line in lines(log.path)]
    assert found == [
        *(("a", 0, False), ("a", 1, False), ("a", 2, False)),
        *(("b", 0, False), ("b", 1, False), ("b", 2, True)),
    ]


def test_lines_wait_for_room_on_the_disk_and_none_is_torn_or_lost(tmp_path, monkeypatch, capsys):
    log = run_folder.Log(tmp_path / "metrics.jsonl")
    log.append({"step": 0})
    open_file = Path.open

    class Full:
        """A disk with room for three more bytes."""

        def __init__(self, file):
            self.file, self.room = file, 3

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def seek(self, *where):
            return self.file.seek(*where)

        def read(self, size):
            return self.file.read(size)

        def truncate(self, size):
            return self.file.truncate(size)

        def write(self, content):
            if not self.room:
                raise OSError(28, "No space left on device")
            written = self.file.write(bytes(content[: self.room]))
            self.room -= written
            return written

    monkeypatch.setattr(
        Path, "open", lambda path, *how, **more: Full(open_file(path, *how, **more))
    )
    log.append({"step": 1})
    log.append({"step": 2})
    monkeypatch.undo()
    assert lines(log.path) == [{"step": 0}]
    assert capsys.readouterr().err.count("No space left") == 1
    log.append({"step": 3})
    assert lines(log.path) == [{"step": step} for step in range(4)]


def test_a_line_after_a_torn_one_is_a_line_of_its_own(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"try": 1}\n{"try": 2, "lo')
    run_folder.append_whole(path, b'{"try": 3}\n')
    assert run_folder.read_lines(path) == [{"try": 1}, {"try": 3}]


def test_what_the_disk_never_took_is_counted_at_the_end(tmp_path, capsys):
    log = run_folder.Log(tmp_path / "nowhere" / "metrics.jsonl")
    log.append({"step": 0})
    log.append({"step": 1})
    log.close()
    assert "lacks 2 line(s)" in capsys.readouterr().err
