"""Runs that go on from their folder alone, that diverge or are interrupted, and what they say."""

import dataclasses
import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from examples.lm import compare, data, generate, record, run_folder
from examples.lm.__main__ import main
from examples.lm.config import CompareConfig, MeshConfig, TrainConfig, UsageError, compared
from tests.trainer import worker
from tests.trainer.worker import RUN, steps_of

pytestmark = pytest.mark.usefixtures("compiled")

COMPARE = ["compare", "--optimizers", "adamw", "sophia_g", *RUN[1:3], *RUN[5:]]


@pytest.fixture
def copy(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    return folder


def losses(folder):
    """Of every line: the run, the step, the training loss and the validation loss."""
    lines = run_folder.read_lines(folder / "metrics.jsonl")
    return [(line["run"], line["step"], line.get("loss"), line.get("val_loss")) for line in lines]


def change(path, **values):
    content = json.loads(path.read_text())
    for name, value in values.items():
        content[name] = value
        if value is None:
            del content[name]
    path.write_text(json.dumps(content))


# --- the folder alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_prints_the_command_that_goes_on_with_it(
    number, finished, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "it's stopped [b]"
    monkeypatch.setattr(worker.signal, "SIGTERM", number)
    assert worker.run([*RUN, "--out", str(folder)], stop_after=4) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("Stopped after step"))
    command = shlex.split(line.partition("Continue: ")[2])
    assert command[:3] == ["python", "-m", "examples.lm"]
    assert command[3:] == ["train", "--resume", "--out", str(folder)]
    assert worker.run(command[3:]) == 0
    assert losses(folder) == losses(finished)


def test_a_stopped_comparison_goes_on_in_the_middle_of_a_run(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    started = [*COMPARE, "--half", "sophia_g", "--out"]
    assert worker.run([*started, str(whole)]) == 0
    assert worker.run([*started, str(cut)], stop_after=4) == 0
    assert {name for name, *_ in losses(cut)} == {"adamw"}
    assert worker.run(["compare", "--resume", "--out", str(cut)], stop_after=3) == 0
    assert worker.run(["compare", "--resume", "--out", str(cut)]) == 0
    assert losses(cut) == losses(whole)
    tables = [json.loads((f / "summary.json").read_text())["runs"] for f in (cut, whole)]
    assert list(tables[1]) == ["adamw", "sophia_g", "sophia_g_half"]
    for name in tables[1]:
        assert tables[0][name]["validation_loss"] == tables[1][name]["validation_loss"]
        assert tables[0][name]["win_rate"] == tables[1][name]["win_rate"]


def test_a_finished_run_reports_the_times_that_were_measured(copy):
    before = json.loads((copy / "summary.json").read_text())["runs"]
    assert worker.run(["train", "--resume", "--out", str(copy)]) == 0
    assert json.loads((copy / "summary.json").read_text())["runs"] == before
    assert before["sophia_g"]["step_seconds"] > 0


def test_a_run_goes_on_to_more_steps_and_says_what_the_schedule_does(copy, finished, capsys):
    assert worker.run(["train", "--resume", "--out", str(copy), "--steps", "14"]) == 0
    printed = capsys.readouterr().out
    assert "14 steps instead of 12" in printed
    assert "learning rate" in printed
    assert [step for _, step, loss, _ in losses(copy) if loss is not None] == list(range(14))
    assert losses(copy)[:13] == losses(finished)
    assert worker.run(["train", "--resume", "--out", str(copy)]) == 0  # the 14 are remembered
    assert worker.run(["train", "--resume", "--out", str(copy), "--steps", "13"]) == 2
    assert "steps was 14 and is 13" in capsys.readouterr().err


def test_the_mesh_of_the_run_is_kept_where_the_devices_allow_it(copy, tmp_path, capsys):
    config = TrainConfig(mesh=MeshConfig(data=1, fsdp=1))
    change(copy / "run.json", mesh={"data": 1, "fsdp": 1, "tensor": 1})
    assert record.stored(TrainConfig, str(copy)).mesh == config.mesh
    assert record.on_these_devices(copy, config) == config
    change(copy / "run.json", mesh={"data": 2, "fsdp": 4, "tensor": 1})
    there = record.on_these_devices(copy, record.stored(TrainConfig, str(copy)))
    assert there.mesh == MeshConfig()
    assert "(2, 4, 1)" in capsys.readouterr().err


# --- run.json of other versions, and damaged ------------------------------------------------------


def test_a_flag_that_run_json_is_older_than_has_its_default(copy, finished):
    change(copy / "run.json", clip_norm=None, accumulate=None, keep=None, text=None)
    assert worker.run(["train", "--resume", "--out", str(copy), "--steps", "12"]) == 0
    assert losses(copy) == losses(finished)


@pytest.mark.parametrize("absolute", [None, False, True])
def test_the_first_versions_sophia_h_used_h_unless_it_was_told_otherwise(absolute, tmp_path):
    found = {"model": "tiny", "optimizer": "sophia_h", "steps": 7}
    if absolute is not None:
        found["absolute_curvature"] = absolute
    (tmp_path / "run.json").write_text(json.dumps(found))
    config = record.stored(TrainConfig, str(tmp_path))
    assert config.optimizer == ("sophia_h" if absolute else "sophia_h_paper")
    assert config.steps == 7


def test_a_run_of_a_later_version_is_not_guessed_at(tmp_path):
    (tmp_path / "run.json").write_text('{"version": 99}')
    with pytest.raises(UsageError, match=r"is of version 99.*Go on with the trainer that wrote it"):
        record.read(tmp_path)


@pytest.mark.parametrize("version", [2, 3])
def test_an_older_comparison_goes_on_without_runs_of_half_of_the_steps(version, tmp_path):
    found = {"version": version, "optimizers": ["adamw", "sophia_g_eigenbasis"], "steps": 7}
    (tmp_path / "run.json").write_text(json.dumps(found))
    names = list(compared(record.stored(CompareConfig, str(tmp_path))))
    assert names == found["optimizers"] + ["sophia_g_eigenbasis_half"] * (version > 2)


@pytest.mark.parametrize(
    "damage",
    [
        {"steps": "many"},
        {"steps": 2.5},
        {"seed": True},
        {"learning_rate": [1]},
        {"data": 7},
        {"attention": "flash"},
        {"mesh": {"data": "all"}},
        {"mesh": {"rows": 1}},
        {"mesh": 8},
    ],
)
def test_a_value_of_the_wrong_type_in_run_json_is_one_sentence(damage, copy, capsys):
    change(copy / "run.json", **damage)
    assert worker.run(["train", "--resume", "--out", str(copy)]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert next(iter(damage)) in message


@pytest.mark.parametrize("name", ["run.json", "summary.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"", b'{"version": 2, "st', b"\0" * 50])
def test_a_half_written_file_ends_in_recovery_or_one_sentence(name, content, copy, capsys):
    (copy / name).write_bytes(content)
    code = worker.run(["train", "--resume", "--out", str(copy)])
    message = capsys.readouterr().err
    if name == "run.json":
        assert code == 2
        assert len(message.splitlines()) == 1
        assert "damaged" in message
    else:
        assert code == 0
        assert json.loads((copy / "summary.json").read_text())["runs"]


def test_a_run_is_resumed_by_the_command_that_began_it(copy, capsys):
    assert worker.run(["compare", "--resume", "--out", str(copy)]) == 2
    command = f"train --resume --out {copy}"
    assert f"made by `train`. Resume it: python -m examples.lm {command}" in capsys.readouterr().err
    with pytest.raises(UsageError, match="made by `train`"):
        record.stored(CompareConfig, str(copy))


# --- its surroundings -----------------------------------------------------------------------------


def test_data_that_has_changed_is_said(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} bottles of beer. " for i in range(500)))
    out = tmp_path / "run"
    assert worker.run([*RUN, "--data", f"text:{text}", "--out", str(out)], stop_after=4) == 0
    assert worker.run(["train", "--resume", "--out", str(out), "--steps", "12"]) == 0
    assert "Warning" not in capsys.readouterr().err
    text.write_text(text.read_text().replace("499 bottles", "498 bottles"))
    assert worker.run(["train", "--resume", "--out", str(out)]) == 0
    message = capsys.readouterr().err
    assert "the data has changed" in message
    assert "validation had" in message
    assert "train had" not in message


def test_a_run_that_is_being_written_is_left_alone(copy, capsys):
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.name != "lock"}
    with run_folder.writer(copy, resume=True):
        assert worker.run(["train", "--resume", "--out", str(copy)]) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert "being written to by another run" in message
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.name != "lock"} == before


def test_results_that_the_disk_does_not_take_are_printed_and_written_later(
    copy, capsys, monkeypatch
):
    def refuse(path, write):
        with run_folder.writing(path):
            raise OSError(28, "No space left on device")

    (copy / "summary.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "replace", refuse)
        assert worker.run(["train", "--resume", "--out", str(copy)]) == 2
    printed = capsys.readouterr()
    assert "validation loss" in printed.out
    assert "summary.json cannot be written (No space left on device)" in printed.err
    assert worker.run(["train", "--resume", "--out", str(copy)]) == 0
    assert (copy / "summary.json").exists()


# --- diverging ------------------------------------------------------------------------------------

WILD = ["--optimizer", "adamw", "--learning-rate", "1e30"]


def test_a_run_that_diverges_says_when_and_ends_with_its_summary_and_plot(tmp_path, capsys):
    out = tmp_path / "run"
    often = ["--save-interval", "1", "--eval-interval", "1"]
    assert worker.run([*RUN, *WILD, *often, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    summary = json.loads((out / "summary.json").read_text())["runs"]["adamw"]
    step = summary["diverged"]
    assert 0 < step < 11
    assert summary["validation_loss"] is None
    assert f"at step {step}. Try a lower --learning-rate" in printed.err
    assert f"diverged at step {step}" in printed.out
    assert (out / "loss.png").exists()
    assert losses(out)[-1][2:] == (None, None)  # JSON has no NaN
    assert max(steps_of(out)) <= step


def test_a_run_that_may_go_on_after_diverging_reaches_its_end(tmp_path, capsys):
    out = tmp_path / "run"
    assert worker.run([*RUN, *WILD, "--no-stop-on-nan", "--out", str(out)]) == 0
    assert capsys.readouterr().err.count("diverged") == 1
    assert losses(out)[-1] == ("adamw", 12, None, None)
    assert 12 in steps_of(out)


def test_a_comparison_keeps_the_others_results_when_one_diverges(tmp_path, monkeypatch, capsys):
    def wild(config):
        runs = compared(config)
        return runs | {"adamw": dataclasses.replace(runs["adamw"], learning_rate=1e30)}

    monkeypatch.setattr(compare, "compared", wild)
    out = tmp_path / "both"
    assert worker.run([*COMPARE, "--out", str(out)]) == 0
    runs = json.loads((out / "summary.json").read_text())["runs"]
    assert runs["adamw"]["diverged"] is not None
    assert runs["sophia_g"]["validation_loss"] > 0
    assert "sophia_g ends at a validation loss" in capsys.readouterr().out


# --- a sample of it -------------------------------------------------------------------------------


def test_a_comparison_is_sampled_by_the_name_of_a_run_and_says_which_there_are(tmp_path, capsys):
    folder = tmp_path / "several"
    assert worker.run([*COMPARE, "--save-interval", "6", "--out", str(folder)]) == 0
    sample = ["generate", "--out", str(folder), "--prompt", "import ", "--tokens", "3"]
    capsys.readouterr()
    for unnamed in ([], ["--run", "lion"]):
        assert worker.run([*sample, *unnamed]) == 2
        said = capsys.readouterr().err
        assert "holds the runs adamw, sophia_g. Choose one with --run NAME" in said
    for name in ("adamw", "sophia_g"):
        assert worker.run([*sample, "--run", name]) == 0
        assert capsys.readouterr().out.startswith("import ")
    shutil.rmtree(folder / "checkpoints" / "sophia_g")
    assert worker.run([*sample, "--run", "sophia_g"]) == 2
    assert "no checkpoint of sophia_g yet" in capsys.readouterr().err


def test_a_folder_without_a_model_to_sample_is_one_sentence_about_sampling(copy, capsys):
    sample = ["generate", "--out", str(copy)]
    assert worker.run([*sample, "--run", "adamw"]) == 2
    assert "holds one run, of sophia_g. Leave out --run adamw" in capsys.readouterr().err
    change(copy / "run.json", optimizers=["adamw"], tries=1)
    assert worker.run(sample) == 2
    assert "made by `tune`, which keeps no model" in capsys.readouterr().err
    (copy / "run.json").unlink()
    assert worker.run(sample) == 2
    said = capsys.readouterr().err
    assert "holds no run to sample from. Check --out." in said
    assert "--resume" not in said


# --- what is printed ------------------------------------------------------------------------------


def test_a_pipe_gets_a_line_for_each_log_interval_and_a_closing(tmp_path, capsys):
    out = tmp_path / "run"
    assert worker.run([*RUN, "--log-interval", "4", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("sophia_g ")][:5]
    assert [line.split()[1] for line in lines] == ["1/12", "5/12", "9/12", "12/12", "12/12"]
    assert all("loss" in line for line in lines[:4])
    assert lines[4].split()[2] == "val"
    assert "\x1b" not in printed
    assert "nan" not in printed
    assert "sophia_g ends at a validation loss of" in printed
    for name in ("loss.png", "metrics.jsonl", "summary.json", "checkpoints"):
        assert name in printed.partition("Written to")[2]
    assert "A sample from sophia_g:" in printed
    corpus = data.load("stdlib")
    assert corpus.codec is not None
    assert corpus.codec.decode(corpus.validation[:20].tolist()) in printed


def test_a_sample_cannot_send_commands_to_the_terminal():
    assert generate.printable("a\tb\r\nø∂\x1b[2J\x9b\r\0") == "a\tb\nø∂�[2J���"


# --- signals --------------------------------------------------------------------------------------

BUSY = """
import hashlib, os, signal, sys, threading, time
from examples.lm import hosts

def send():
    for number in map(int, sys.argv[1:]):
        time.sleep(0.3)
        os.kill(os.getpid(), number)

with hosts.termination():
    threading.Thread(target=send, daemon=True).start()
    for _ in range(100):
        hashlib.pbkdf2_hmac("sha256", b"", b"", 30_000_000)  # as a compilation, it runs no handler
"""


@pytest.mark.parametrize(
    "first, second",
    [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, 15)],
)
def test_a_second_signal_ends_the_process_at_once(first, second):
    command = [sys.executable, "-c", BUSY, str(int(first)), str(int(second))]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 128 + second
    assert done.stderr.count("a second signal ends at once") == 1


def test_ctrl_c_before_the_training_is_one_word(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", interrupt)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"
