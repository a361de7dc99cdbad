"""Wrong invocations of the trainer: one sentence, exit code 2, nothing written."""

import argparse
import dataclasses
import sys
import typing

import jax
import numpy as np
import pytest
from rich.console import Console

from examples.arguments import whole
from examples.lm import compare, data
from examples.lm.__main__ import COMMANDS, main
from examples.lm.config import TrainConfig
from examples.lm.generate import GenerateConfig
from examples.lm.run import resolve
from tests.trainer import worker

BAD = {
    "unknown model": ("--model gpt5", "model 'gpt5'"),
    "unknown optimizer": ("--optimizer sgd", "optimizer 'sgd'"),
    "unknown data source": ("--data wikipedia", "'wikipedia'"),
    "stream without a name": ("--data hf:", "'hf:'"),
    "stream that is not there": ("--data hf:{tmp}/nothing", "dataset"),
    "unknown kind of data": ("--data parquet:{tmp}", "'parquet:"),
    "unknown tokenizer": ("--tokenizer words", "'words'"),
    "too small a vocabulary": ("--tokenizer bpe:100", "'bpe:100'"),
    "mesh that does not divide": ("--mesh.data 3", "3 x 1 x 1"),
    "mesh that is too large": ("--mesh.data 16", "needs 16 devices"),
    "mesh with two unknowns": ("--mesh.data -1 --mesh.fsdp -1", "has no size"),
    "mesh with a zero": ("--mesh.fsdp 0", "has no size"),
    "tensor axis beyond the devices": ("--mesh.tensor 5", "there are 8"),
    "batch smaller than the mesh": ("--batch-size 4", "--batch-size 4"),
    "batch that does not divide": ("--batch-size 12", "--batch-size 12"),
    "no batch": ("--batch-size 0", "--batch-size is 0"),
    "microbatches that do not divide": ("--accumulate 3", "--accumulate 3"),
    "no microbatches": ("--accumulate 0", "--accumulate is 0"),
    "curvature batch smaller than the mesh": ("--curvature-batch 4", "--curvature-batch 4"),
    "curvature batch that does not divide": (
        "--batch-size 32 --curvature-batch 24",
        "does not divide --batch-size 32",
    ),
    "heads that do not divide the width": ("--heads 5", "--heads 5 does not divide --width 64"),
    "no layers": ("--layers 0", "--layers is 0"),
    "dropout of everything": ("--dropout 1", "--dropout is 1"),
    "a logger that is not installed": ("--wandb project", "needs the package wandb"),
    "no steps": ("--steps 0", "--steps is 0"),
    "negative learning rate": ("--learning-rate -1", "--learning-rate is -1"),
    "learning rate that is no number": ("--learning-rate nan", "--learning-rate is nan"),
    "average that forgets nothing": ("--b1 1", "--b1 is 1"),
    "no curvature scale": ("--gamma 0", "--gamma is 0"),
    "a win rate of all": ("--win-rate 1", "--win-rate is 1"),
    "a curvature scale without curvature": (
        "--optimizer adamw --gamma 0.3",
        "--gamma is 0.3, and adamw does not use it. Leave it out, or choose one of: sophia_g,",
    ),
    "an interval without curvature": ("--optimizer lion --update-interval 5", "does not use it"),
    "a basis that it does not turn to": (
        "--basis-interval 2",
        "choose one of: sophia_g_eigenbasis",
    ),
    "a win rate of Optax's": ("--optimizer contrib_sophia --win-rate 0.5", "does not use it"),
    "gamma twice": ("--gamma 0.1 --win-rate 0.3", "--gamma and --win-rate"),
    "negative weight decay": ("--weight-decay -0.1", "--weight-decay is -0.1"),
    "warm-up beyond the run": ("--warmup 2", "--warmup is 2"),
    "no curvature interval": ("--update-interval 0", "--update-interval is 0"),
    "negative seed": ("--seed -1", "--seed is -1"),
    "no checkpoint kept": ("--keep 0", "--keep is 0"),
    "no validation interval": ("--eval-interval 0", "--eval-interval is 0"),
    "fused attention without a GPU": ("--attention cudnn", "NVIDIA"),
    "process without the others": (
        "--hosts.coordinator localhost:1 --hosts.process 0",
        "--hosts.processes",
    ),
    "heartbeat of no length": (
        "--hosts.coordinator localhost:1 --hosts.process 0 --hosts.processes 1 --hosts.timeout 0",
        "--hosts.timeout is 0",
    ),
    "cluster that is none": ("--hosts.auto", "did not meet"),
    "resume without a folder": ("--resume", "--out"),
    "resume with nothing there": ("--resume --out {tmp}/nothing", "no run to resume"),
    "a folder instead of files": ("--data text:{tmp}", "is a folder. Name its files"),
    "files that do not exist": ("--data text:{tmp}/*.none", "No file matches"),
    "empty files": ("--data text:{tmp}/empty.txt", "are empty"),
    "text shorter than a window": ("--data text:{tmp}/short.txt", "has 17 tokens"),
    "no token files": ("--data bin:{tmp}", "train.bin"),
    "half a token": ("--data bin:{tmp}/odd", "16-bit"),
    "results in the way": ("--out {tmp}/used", "exists already"),
    "a file in the way": ("--out {tmp}/short.txt", "exists already"),
}


@pytest.fixture
def places(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("sixteen letters. " * 10)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "train.bin").write_bytes(b"abc")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "summary.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_invocation_ends_in_one_sentence_and_code_2(
    name, places, capsys, monkeypatch, tmp_path_factory
):
    monkeypatch.chdir(places)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
    flags, expected = BAD[name]
    before = {p: p.read_bytes() for p in places.rglob("*") if p.is_file()}
    assert main(["train", *flags.format(tmp=places).split()]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert len(message.splitlines()) == 1
    assert {p: p.read_bytes() for p in places.rglob("*") if p.is_file()} == before


EMPTY = {"compare": "--optimizers", "tune": "--optimizers", "plan": "--optimizer"}


@pytest.mark.parametrize("command", EMPTY)
def test_a_flag_that_takes_several_names_takes_at_least_one(command, capsys):
    assert main([command, EMPTY[command]]) == 2
    assert capsys.readouterr().err == f"{EMPTY[command]} is empty. Give it a value.\n"


def numbers(kind, prefix=""):
    """The flags of a command that take a number, but for the mesh's, which may be -1."""
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint) and name != "mesh":
            yield from numbers(hint, f"{name}.")
        elif {int, float} & {hint, *typing.get_args(hint)}:
            yield prefix + name, float in (hint, *typing.get_args(hint))


def test_every_number_of_every_command_is_checked(capsys):
    for kind in COMMANDS:
        command = kind.__name__.removesuffix("Config").lower()
        out = ["--out", "none"] if kind is GenerateConfig else []
        for name, is_float in numbers(kind):
            for value in ("-1e9", "nan", "inf") if is_float else ("-9", str(2**70)):
                given = f"--{name.replace('_', '-')}={value}"
                assert main([command, *out, given]) == 2
                assert "It has to be" in capsys.readouterr().err, (command, given)


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "nan", str(2**31)])
def test_the_small_examples_refuse_such_numbers(text, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=whole(1))
    with pytest.raises(SystemExit):
        parser.parse_args([f"--steps={text}"])
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    "optimizer, batch_size, expected",
    [("sophia_g", 16, 8), ("sophia_g", 15, 5), ("sophia_g", 1, 1), ("sophia_g", 7, 1)],
)
def test_half_a_batch_is_its_largest_divisor_up_to_that(optimizer, batch_size, expected):
    config = TrainConfig(optimizer=optimizer, batch_size=batch_size)
    assert resolve(config, devices=jax.devices()[:1]).curvature_batch == expected


def test_half_a_batch_spreads_over_the_devices():
    assert resolve(TrainConfig(batch_size=24), devices=jax.devices()[:4]).curvature_batch == 12
    assert resolve(TrainConfig(batch_size=24), devices=jax.devices()[:8]).curvature_batch == 8
    assert resolve(TrainConfig(batch_size=8), devices=jax.devices()[:8]).curvature_batch == 8


@pytest.mark.parametrize("batch_size", [1, 15])
def test_an_optimizer_without_curvature_takes_any_batch(batch_size):
    config = TrainConfig(optimizer="adamw", batch_size=batch_size, curvature_batch=2)
    assert resolve(config, devices=jax.devices()[:1]).config.batch_size == batch_size


# --- a short text ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens, passes", [(1_000, 31), (2_000, None)])
def test_a_text_that_is_read_many_times_is_said_with_what_to_do(tokens, passes, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(worker.MODELS, "micro", worker.MICRO)
        config = TrainConfig(model="micro", steps=122, batch_size=16)
        runs = {"sophia_g": resolve(config)}
    text = np.zeros(tokens, np.uint16)
    corpus = data.Corpus(text, text, text, 256)
    compare.describe(Console(soft_wrap=True), config, runs, corpus, tmp_path)
    said = capsys.readouterr().out
    assert (f"reads that text {passes} times" in said) == (passes is not None)
    assert ("Take fewer --steps" in said) == (passes is not None)
