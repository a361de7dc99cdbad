"""Runs that stop and go on: on purpose, by a signal, past a torn file, on another mesh."""

import contextlib
import errno
import json
import os
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from examples.lm import report
from examples.lm.__main__ import main
from examples.lm.checkpoint import Checkpoints
from examples.lm.config import MODELS, ModelConfig, TrainConfig, UsageError

MICRO = ModelConfig(layers=1, width=16, heads=2, context=16, vocab_size=256, init_scale=0.1)
RUN = (
    "train --model micro --optimizer sophia_g --steps 12 --batch-size 8 --log-interval 1 "
    "--save-interval 4 --eval-interval 12 --eval-batches 1"
)


@pytest.fixture(scope="module", autouse=True)
def one_device_and_a_micro_preset():
    device = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "micro", MICRO)
        patch.setattr(jax, "devices", lambda *_: device)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert main([*RUN.split(), "--out", str(folder)]) == 0
    return folder


def final_state(folder):
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        return manager.restore(12, args=args)["state"]


def assert_same_run(folder, finished):
    for x, y in zip(*map(jax.tree.leaves, map(final_state, (folder, finished))), strict=True):
        np.testing.assert_array_equal(x, y)
    mine, theirs = (
        report.read_metrics(f / "metrics.jsonl")["sophia_g"] for f in (folder, finished)
    )
    for x, y in zip(mine, theirs, strict=True):
        assert (x["step"], x.get("loss"), x.get("val_loss")) == (
            y["step"], y.get("loss"), y.get("val_loss"),
        )  # fmt: skip


def test_the_newest_checkpoints_are_kept(finished):
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {"4", "8", "12"}


def test_a_torn_checkpoint_is_named_and_the_one_before_it_resumed_to_the_bit(
    finished, tmp_path, capsys
):
    folder = tmp_path / "torn"
    shutil.copytree(finished, folder)
    files = [p for p in (folder / "checkpoints" / "12").rglob("*") if p.is_file()]
    for file in files:
        os.truncate(file, file.stat().st_size // 2)
    assert main([*RUN.split(), "--resume", "--out", str(folder)]) == 0
    assert str(folder / "checkpoints" / "12") in capsys.readouterr().err
    assert_same_run(folder, finished)


def test_sigterm_saves_and_leaves_with_code_0_and_the_run_resumes_to_the_bit(
    finished, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "terminated"

    def tracker(*args, make=report.tracker):
        log = make(*args)

        def log_and_terminate(record):
            log(record)
            if record["step"] == 5:
                os.kill(os.getpid(), signal.SIGTERM)

        return log_and_terminate

    with monkeypatch.context() as patch:
        patch.setattr(report, "tracker", tracker)
        assert main([*RUN.split(), "--out", str(folder)]) == 0
    assert "--resume" in capsys.readouterr().out
    newest = max(int(p.name) for p in (folder / "checkpoints").iterdir())
    assert newest in (6, 7)
    assert main([*RUN.split(), "--resume", "--out", str(folder)]) == 0
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
    assert main([*RUN.split(), *flags.split(), "--resume", "--out", str(finished)]) == 2
    assert difference in capsys.readouterr().err
    assert (finished / "run.json").read_text() == before


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk_is_said_and_the_older_checkpoints_are_kept(
    finished, tmp_path, monkeypatch, capsys, policy
):
    folder = tmp_path / "full"
    shutil.copytree(finished, folder)

    def save(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    store = Checkpoints(folder, TrainConfig(model="micro", on_save_error=policy))
    ending = pytest.raises(UsageError) if policy == "stop" else contextlib.nullcontext()
    with ending as raised:
        store.save(13, None, {})
    message = capsys.readouterr().err if raised is None else str(raised.value)
    assert "No space left on device" in message
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"4", "8", "12"}


def test_the_metrics_file_is_one_json_object_a_line(finished):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    training, validation = records[:-1], records[-1]
    assert [r["step"] for r in training] == list(range(12))
    for record in training:
        assert set(record) == {
            *("run", "step", "loss", "grad_norm", "learning_rate", "win_rate"),
            "tokens_per_second",
        }
    assert set(validation) == {"run", "step", "val_loss"}
