"""Runs that stop and go on: signalled, killed, past torn files and full disks, on other meshes."""

import contextlib
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboardX.proto.event_pb2 import Event

from examples.lm import checkpoint, run_folder
from examples.lm.__main__ import main
from examples.lm.checkpoint import Checkpoints
from examples.lm.config import TrainConfig, UsageError
from examples.lm.run import resolve
from examples.lm.train import Trainer
from tests.trainer import worker
from tests.trainer.worker import RUN, steps_of

pytestmark = pytest.mark.usefixtures("compiled")

FLAGS = {"model": "micro", "steps": 12, "batch_size": 8, "curvature_batch": 8}


def leftovers(folder):
    return [p.name for p in (folder / "checkpoints").iterdir() if "tmp" in p.name]


def final_state(folder):
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        return manager.restore(12, args=args)["state"]


def losses(folder):
    """Of every line: the step, the training loss and the validation loss."""
    lines = run_folder.read_metrics(folder / "metrics.jsonl")["sophia_g"]
    return [(line["step"], line.get("loss"), line.get("val_loss")) for line in lines]


def assert_same_run(folder, finished):
    assert losses(folder) == losses(finished)
    for x, y in zip(*map(jax.tree.leaves, map(final_state, (folder, finished))), strict=True):
        np.testing.assert_array_equal(x, y)


# --- stopping -------------------------------------------------------------------------------------


def test_the_newest_checkpoints_are_kept(finished):
    assert steps_of(finished) == {4, 8, 12}


def test_sigterm_saves_and_leaves_with_code_0_and_the_run_resumes_to_the_bit(
    finished, tmp_path, capsys
):
    folder = tmp_path / "terminated"
    assert worker.run([*RUN, "--out", str(folder)], stop_after=5) == 0
    assert "--resume" in capsys.readouterr().out
    assert max(steps_of(folder)) in (6, 7)
    assert worker.run([*RUN, "--resume", "--out", str(folder)]) == 0
    assert_same_run(folder, finished)


def test_a_run_that_has_nothing_left_to_do_reports_once_more(finished, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    (folder / "summary.json").unlink()
    assert worker.run([*RUN, "--resume", "--out", str(folder)]) == 0
    again, before = (json.loads((f / "summary.json").read_text()) for f in (folder, finished))
    expected = before["runs"]["sophia_g"]["validation_loss"]
    assert again["runs"]["sophia_g"]["validation_loss"] == expected
    assert losses(folder) == losses(finished)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_run_killed_twice_loses_no_more_than_the_steps_since_its_last_save(
    finished, tmp_path, compiled, capsys
):
    folder = tmp_path / "killed"
    arguments = [*RUN, "--save-interval", "1", "--out", str(folder)]
    started = time.monotonic()
    process = worker.start(arguments, 1, compiled, pause=0.1)
    wait_for((folder / "checkpoints").is_dir, process)
    wait_for(lambda: len(steps_of(folder)) > 1 and leftovers(folder), process)  # in a save
    process.kill()
    printed, lifetime = process.communicate()[0], time.monotonic() - started
    assert process.returncode == -signal.SIGKILL, printed

    arguments.append("--resume")
    process = worker.start(arguments, 1, compiled, pause=0.1)
    time.sleep(random.uniform(0, lifetime))  # at any moment
    process.kill()
    process.communicate()
    saved = max(steps_of(folder))
    capsys.readouterr()
    assert worker.run(arguments) == 0
    assert f"Resuming after step {saved}." in capsys.readouterr().out
    assert not leftovers(folder)
    assert_same_run(folder, finished)


def test_a_run_stopped_before_its_first_checkpoint_resumes_at_its_start(tmp_path):
    store = Checkpoints(tmp_path, TrainConfig(model="micro"))
    assert store.restore(None) is None


# --- what is on the disk --------------------------------------------------------------------------


def test_a_torn_checkpoint_is_named_and_the_one_before_it_resumed_to_the_bit(
    finished, tmp_path, capsys
):
    folder = tmp_path / "torn"
    shutil.copytree(finished, folder)
    torn = folder / "checkpoints" / "12"
    shutil.copytree(torn, folder / "checkpoints" / "16.orbax-checkpoint-tmp")  # killed in a save
    for file in [p for p in torn.rglob("*") if p.is_file()]:
        os.truncate(file, file.stat().st_size // 2)
    assert worker.run([*RUN, "--resume", "--out", str(folder)]) == 0
    assert str(torn) in capsys.readouterr().err
    assert not leftovers(folder)
    assert_same_run(folder, finished)


@pytest.fixture
def stored(finished, tmp_path):
    """A copy of the finished run, and a function that restores from it."""
    folder = tmp_path / "stored"
    shutil.copytree(finished, folder)
    config = TrainConfig(**FLAGS)
    trainer = Trainer(resolve(config).with_vocabulary(256))

    def restore(trainer=trainer, **how):
        store = Checkpoints(folder, config, **how)
        try:
            return store.restore(trainer.abstract_sharded_state())
        finally:
            store.close()

    return folder, restore


def flip(path, position):
    """One bit."""
    content = bytearray(path.read_bytes())
    content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)


def check_flips(folder, restore, expected, count):
    """Flips bits of the newest checkpoint, one after the other; each is noticed or does nothing."""
    rng = np.random.default_rng(0)
    newest = folder / "checkpoints" / "12"
    files = sorted(p for p in newest.rglob("*") if p.is_file())
    noticed = 0
    for _ in range(count):
        path = files[rng.integers(len(files))]
        position = int(rng.integers(8 * path.stat().st_size))
        flip(path, position)
        step, state, _ = restore(read_only=True)
        flip(path, position)
        noticed += step == 8
        for x, y in zip(*map(jax.tree.leaves, (state, expected[step])), strict=True):
            np.testing.assert_array_equal(x, y)
    return noticed


def states(folder, restore):
    """The states of the newest two checkpoints."""
    _, newest, _ = restore(read_only=True)
    hidden = folder / "hidden"
    (folder / "checkpoints" / "12").rename(hidden)
    _, older, _ = restore(read_only=True)
    hidden.rename(folder / "checkpoints" / "12")
    return {12: newest, 8: older}


def test_a_flipped_bit_costs_its_checkpoint_and_restores_no_other_number(stored, capsys):
    folder, restore = stored
    noticed = check_flips(folder, restore, states(folder, restore), 12)
    assert noticed >= 10
    assert "its SHA-256 differs" in capsys.readouterr().err


@pytest.mark.stress
def test_500_flipped_bits_restore_no_other_number(stored, capsys):
    folder, restore = stored
    noticed = check_flips(folder, restore, states(folder, restore), 500)
    with capsys.disabled():
        sys.stdout.write(f"\n{noticed} of 500 flipped bits were noticed; the rest change nothing\n")
    assert noticed > 400


def test_a_checkpoint_under_another_steps_name_is_noticed(stored, capsys):
    folder, restore = stored
    (folder / "checkpoints" / "8").rename(folder / "checkpoints" / "20")
    step, _, _ = restore()
    assert step == 12
    assert "saved after step 8, and its folder was renamed" in capsys.readouterr().err
    (folder / "checkpoints" / "12").rename(folder / "checkpoints" / "12 backup")
    step, _, _ = restore()
    assert step == 4
    assert "12 backup is not named after a step" in capsys.readouterr().err


def test_a_checkpoint_of_an_earlier_version_is_read_and_its_step_checked(stored, capsys):
    folder, restore = stored
    for step in (4, 8, 12):
        (folder / "checkpoints" / str(step) / "digests.json").unlink()
    assert restore()[0] == 12
    (folder / "checkpoints" / "8").rename(folder / "checkpoints" / "20")
    assert restore()[0] == 12
    assert "holds the state after step 8" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_for_a_moment_changes_nothing(stored, monkeypatch):
    folder, restore = stored

    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "sha256", fail)
    with pytest.raises(UsageError, match="Input/output error"):
        restore()
    monkeypatch.undo()
    assert steps_of(folder) == {4, 8, 12}
    assert restore()[0] == 12


def test_a_state_of_another_form_changes_nothing(stored):
    folder, restore = stored
    other = TrainConfig(**FLAGS | {"optimizer": "adamw"})
    trainer = Trainer(resolve(other).with_vocabulary(256))
    with pytest.raises(UsageError, match="whole, as its digests say"):
        restore(trainer)
    assert steps_of(folder) == {4, 8, 12}


@pytest.mark.parametrize("loss", ["all damaged", "all renamed", "all gone"])
def test_a_run_whose_checkpoints_are_lost_never_begins_anew_over_its_history(
    loss, finished, tmp_path, capsys
):
    folder = tmp_path / "lost"
    shutil.copytree(finished, folder)
    for path in (folder / "checkpoints").iterdir():
        if loss == "all damaged":
            for file in path.rglob("manifest.ocdbt"):
                file.write_bytes(b"x")
        elif loss == "all renamed":
            path.rename(path.with_suffix(".unreadable"))
        else:
            shutil.rmtree(path)
    before = sorted(p.name for p in (folder / "checkpoints").iterdir())
    for _ in range(2):
        assert worker.run([*RUN, "--resume", "--out", str(folder)]) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert "checkpoint" in message
        assert "another --out" in message
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == before
    assert losses(folder) == losses(finished)


def test_a_name_with_brackets_holds_checkpoints_that_can_be_read(finished, tmp_path):
    folder = tmp_path / "lr=[0.1] *?"
    assert worker.run([*RUN, "--out", str(folder)], stop_after=5) == 0
    assert worker.run([*RUN, "--out", str(folder), "--resume"]) == 0
    assert_same_run(folder, finished)


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        ("--optimizer adamw", "optimizer was sophia_g and is adamw"),
        ("--model tiny", "model was micro and is tiny"),
        ("--learning-rate 0.5", "is 0.5"),
        ("--seed 7", "seed was 0 and is 7"),
    ],
)
def test_another_runs_checkpoint_is_refused_by_naming_what_differs(
    finished, flags, difference, capsys
):
    before = (finished / "run.json").read_text()
    arguments = [*RUN, *flags.split(), "--resume", "--out", str(finished)]
    assert worker.run(arguments) == 2
    assert difference in capsys.readouterr().err
    assert (finished / "run.json").read_text() == before


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """A file system of its own."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.call(mount):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def few_inodes(folder: Path):
    """A file system for 400 files; yields a function that makes as many as it takes."""
    with mounted(folder, "size=64m,nr_inodes=400"):
        ballast = folder / "ballast"

        def fill(full: bool) -> None:
            shutil.rmtree(ballast, ignore_errors=True)
            with contextlib.suppress(OSError):
                ballast.mkdir()
                for number in range(400 * full):
                    (ballast / str(number)).touch()

        yield fill


@contextlib.contextmanager
def small_disk(folder: Path):
    """A file system of a megabyte; yields a function that fills or empties it."""
    ballast = folder / "ballast"

    def fill(full: bool) -> None:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while full:
                file.write(bytes(4096))
        if full:  # room for a line of metrics, not for a checkpoint
            os.truncate(ballast, ballast.stat().st_size - 4 * 4096)

    with mounted(folder, "size=1m"):
        yield fill


@contextlib.contextmanager
def small_files(folder: Path):
    """Any disk; yields a function that limits what a file may hold, or lifts the limit."""
    folder.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(full: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384 if full else soft, hard))

    try:
        yield limit
    finally:
        limit(False)


# Orbax leaves coroutines of a save that failed to the garbage collector, which complains of them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("make_disk", [small_disk, small_files, few_inodes])
@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_full_disk_is_said_costs_one_checkpoint_and_no_step(
    make_disk, policy, finished, tmp_path, capsys
):
    with make_disk(tmp_path / "disk") as fill:
        folder = tmp_path / "disk" / "run"
        arguments = [*RUN, "--on-save-error", policy, "--out", str(folder)]

        def fill_for_the_second_save(step: int) -> None:
            while step == 5 and 4 not in steps_of(folder):
                time.sleep(0.01)
            if step == 10:
                time.sleep(1)  # the save after step 8 has failed by then
            if step in (5, 10):
                fill(step == 5)

        code = worker.run(arguments, seen=fill_for_the_second_save)
        fill(False)
        message = capsys.readouterr().err
        assert "checkpoint after step 8 could not be saved" in message
        assert "No space left" in message or "File too large" in message
        if policy == "stop":
            assert code == 2
            assert steps_of(folder) == {4}
            assert worker.run([*arguments, "--resume"]) == 0
            assert steps_of(folder) == {4, 8, 12}
        else:
            assert code == 0
            assert steps_of(folder) == {4, 12}
        assert not leftovers(folder)
        assert_same_run(folder, finished)
    gc.collect()


# --- another mesh ---------------------------------------------------------------------------------


def test_a_run_goes_on_on_other_devices_with_the_same_losses_to_rounding(
    finished, tmp_path, compiled
):
    folder = tmp_path / "moved"
    arguments = [*RUN, "--out", str(folder)]
    for devices, data, stop_after in ((8, 2, 2), (4, 1, 6)):
        mesh = ["--mesh.data", str(data), "--mesh.fsdp", "4"]
        process = worker.start([*arguments, *mesh], devices, compiled, stop_after=stop_after)
        printed = process.communicate(timeout=200)[0]
        assert process.returncode == 0, printed
        assert "Stopped after step" in printed
        arguments = [*RUN, "--out", str(folder), "--resume"]
    assert worker.run(arguments) == 0
    for mine, theirs in zip(losses(folder), losses(finished), strict=True):
        assert mine[0] == theirs[0]
        for x, y in zip(mine[1:], theirs[1:], strict=True):
            assert x == (y if y is None else pytest.approx(y, rel=1e-4))


# --- what is left of a run ------------------------------------------------------------------------


def test_the_metrics_file_is_one_json_object_a_line(finished):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    training, validation = records[:-1], records[-1]
    assert [r["step"] for r in training] == list(range(12))
    names = {"run", "step", "loss", "grad_norm", "learning_rate", "win_rate", "gamma"}
    assert set(training[0]) == names, "the first step compiles, which says nothing of the speed"
    for record in training[1:]:
        assert set(record) == names | {"tokens_per_second"}
    assert set(validation) == {"run", "step", "val_loss"}


def events(folder):
    """What TensorBoard would read: records of a length, its checksum, the bytes and theirs."""
    (path,) = folder.iterdir()
    content = path.read_bytes()
    while content:
        size = int.from_bytes(content[:8], "little")
        yield Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]


def test_tensorboard_shows_what_the_metrics_file_holds(finished):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    expected = {
        (r["step"], name): r[name] for r in records for name in r if name not in ("run", "step")
    }
    shown = {
        (event.step, value.tag): value.simple_value
        for event in events(finished / "tensorboard" / "sophia_g")
        for value in event.summary.value
    }
    assert shown == pytest.approx(expected, rel=1e-6)


def test_a_sample_begins_with_its_prompt_and_leaves_the_run_as_it_is(finished, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    flags = ["--out", str(finished), "--prompt", "import ", "--tokens", "5", "--seed"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(worker.MODELS, "micro", worker.MICRO)
        samples = []
        for seed in ("0", "0", "1"):
            assert main(["generate", *flags, seed]) == 0
            samples.append(capsys.readouterr().out)
    assert samples[0].startswith("import ")
    assert len(samples[0]) > len("import \n")
    assert samples[0] == samples[1] != samples[2]
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before
