"""Too little memory, of the device or the host: one sentence, and no checkpoint is lost."""

import json
import shutil
import subprocess
import sys

import jax
import pytest

from examples.lm import run_folder
from examples.lm.__main__ import main
from examples.lm.train import Trainer
from tests.trainer import worker
from tests.trainer.worker import RUN, steps_of

pytestmark = pytest.mark.usefixtures("compiled")

# What XLA raises for a program that has no room, for a CPU's step that has none, and the host.
ERRORS = [
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 75633098884 bytes."),
    jax.errors.JaxRuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating"),
    MemoryError("Unable to allocate 29.8 GiB for an array"),
    MemoryError("std::bad_alloc"),
    MemoryError(),
]


@pytest.mark.skipif(sys.platform != "linux", reason="limits what a process may allocate")
def test_a_model_that_is_larger_than_the_memory_ends_in_one_sentence(tmp_path, compiled):
    large = [*RUN, "--width", "32768", "--out", str(tmp_path / "run")]
    words = ["bash", "-c", 'ulimit -v 12000000; exec "$@"', "bash", sys.executable, "-m"]
    done = subprocess.run(
        [*words, "tests.trainer.worker", "{}", *large],
        cwd=worker.ROOT,
        env=worker.environment(1, jax_compilation_cache_dir=compiled),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    message = done.stderr.splitlines()[-1]
    assert "Out of memory allocating 17179869184 bytes" in message
    assert "its 12,894,306,304 parameters and the optimizer's state take 154," in message
    assert "Try a smaller --batch-size, a larger --accumulate" in message
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_a_run_whose_memory_runs_out_keeps_its_checkpoints_and_goes_on(
    error, finished, tmp_path, capsys
):
    folder, step = tmp_path / "run", Trainer.step

    def run_out(self, state, batch, number):
        if number == 6:
            raise error
        return step(self, state, batch, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", run_out)
        assert worker.run([*RUN, "--out", str(folder)]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert "micro with sophia_g does not fit in memory" in message
    assert (str(error) or "(MemoryError)").rstrip(".") in message
    assert "--resume takes --remat" in message
    assert steps_of(folder) == {4}
    assert worker.run(["train", "--resume", "--remat", "--out", str(folder)]) == 0
    lines, expected = (run_folder.read_log(f / "metrics.jsonl") for f in (folder, finished))
    assert [x["step"] for x in lines] == [x["step"] for x in expected]


def test_an_error_of_the_program_is_none_of_the_memory(tmp_path, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(Trainer, "step", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        worker.run([*RUN, "--out", str(tmp_path / "run")])


def test_a_search_whose_memory_runs_out_ends_in_one_sentence(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(Trainer, "step", fail)
    sizes = ["--model", "micro", "--steps", "2", "--batch-size", "8", "--eval-batches", "1"]
    assert main(["tune", *sizes, "--optimizers", "adamw", "--out", str(tmp_path / "run")]) == 2
    assert "micro with adamw does not fit in memory" in capsys.readouterr().err


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("command", [["train", "--resume"], ["generate"]])
def test_a_checkpoint_that_memory_is_too_small_for_is_left_as_it_is(
    command, digests, finished, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    if not digests:
        for path in folder.rglob("digests.json"):
            path.unlink()

    def fail(*_, **__):
        raise ERRORS[0]

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.restore", fail)
    assert worker.run([*command, "--out", str(folder)]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert "does not fit in memory" in message
    assert ("--batch-size," in message) == (command[0] == "train")
    assert steps_of(folder) == {4, 8, 12}
    assert len(json.loads((folder / "run.json").read_text())) > 1


def test_a_text_that_is_larger_than_the_memory_is_one_sentence(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise MemoryError

    (tmp_path / "text.txt").write_text("text")
    monkeypatch.setattr("pathlib.Path.read_bytes", fail)
    assert main(["train", "--data", f"text:{tmp_path}/text.txt", "--out", str(tmp_path / "r")]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert "does not fit in memory" in message
    assert "bin:FOLDER" in message
    assert not (tmp_path / "r").exists()
