"""run.json: the settings that a run was started with, and what may change when it goes on."""

import contextlib
import dataclasses
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

from . import data, hosts, run_folder
from .config import (
    CompareConfig,
    LoopConfig,
    MeshConfig,
    RunConfig,
    TrainConfig,
    TuneConfig,
    UsageError,
)
from .mesh import make_mesh
from .run import Run, resolve

Config = TypeVar("Config", CompareConfig, TrainConfig, TuneConfig)

# Settings of the machine or of one start, which run.json does not keep.
NOT_KEPT = {"hosts", "out", "resume"}

# What may differ between a run and its continuation: none of it changes the numbers.
FREE = {
    *("mesh", "refresh", "remat", "attention", "log_interval", "save_interval", "keep"),
    *("on_save_error", "stop_on_nan", "eval_interval", "eval_batches"),
    *("profile", "wandb"),
}

# The form of run.json. Version 1 is that of files that do not name one.
VERSION = 3


class Started(NamedTuple):
    """What a command works with, new or continued.

    Attributes:
      folder: its own, locked.
      runs: the runs by their optimizers.
      corpus: their text.
      again: the command that goes on with it.
    """

    folder: Path
    runs: dict[str, Run]
    corpus: data.Corpus
    again: str


@contextlib.contextmanager
def started(config: RunConfig, configs: dict[str, TrainConfig], command: str) -> Iterator[Started]:
    """Reads the text, and locks a new folder or the one that `--resume` goes on in.

    Raises:
      UsageError: something cannot be, or the folder holds another run.
    """
    if isinstance(config, LoopConfig):
        hosts.join(config.hosts)
    folder = run_folder.existing(config.out) if config.resume else None
    if folder is not None:
        configs = {name: on_these_devices(folder, c) for name, c in configs.items()}
    runs = {name: resolve(of_run) for name, of_run in configs.items()}
    kept = None if folder is None else folder / run_folder.TOKENIZER
    corpus = data.load(config.data, config.tokenizer, kept)
    runs = {name: run.with_vocabulary(corpus.vocab_size) for name, run in runs.items()}
    data.check_length(corpus, next(iter(runs.values())).model.context)
    if folder is None:
        folder = run_folder.new(config.out, command)
    again = continuation(command, folder)
    with (
        run_folder.writer(folder, resume=config.resume),
        hosts.message_on_abort(
            "Stopped: this process or another one of the run died; the lines above say which. "
            f"Start all of them again: {again}"
        ),
    ):
        if config.resume:
            check_same_run(folder, config, runs)
            check_same_text(folder, corpus)
        else:
            write(folder, config, runs, corpus)
        yield Started(folder, runs, corpus, again)


def continuation(command: str, folder: Path) -> str:
    """The command that goes on with a run."""
    hosts_too = " --hosts.* as before" if jax.process_count() > 1 else ""
    return f"python -m {__package__} {command} --resume --out {shlex.quote(str(folder))}{hosts_too}"


def write(folder: Path, config: RunConfig, runs: dict[str, Run], corpus: data.Corpus) -> None:
    """Writes down what run this is, and the tokenizer that was learnt for it."""
    if jax.process_index() != 0:
        return
    if corpus.codec is not None and corpus.codec.learnt is not None:
        learnt = corpus.codec.learnt
        run_folder.replace(folder / run_folder.TOKENIZER, lambda path: path.write_text(learnt))
    text = {"text": data.fingerprint(corpus)}
    run_folder.write_json(folder / run_folder.RECORD, settings(config, runs) | text)


def settings(config: RunConfig, runs: dict[str, Run]) -> dict[str, Any]:
    """All that a run was started with, the optimizers' defaults filled in."""
    kept = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_KEPT}
    found = {name: dataclasses.asdict(run.hyperparameters) for name, run in runs.items()}
    if isinstance(config, TrainConfig):
        (hyperparameters,) = found.values()
        return {"version": VERSION, **kept, **hyperparameters}
    return {"version": VERSION, **kept, "hyperparameters": found}


def read(folder: Path) -> dict[str, Any]:
    """What `write` wrote, or an earlier version of it."""
    found = run_folder.read_json(folder / run_folder.RECORD)
    if found.get("version", 1) > VERSION:
        raise UsageError(
            f"{folder / run_folder.RECORD} is of version {found['version']}, and this trainer "
            f"writes version {VERSION}. Go on with the trainer that wrote it."
        )
    if found.get("version", 1) == 1:
        # --absolute-curvature was off where it was not given, or not known yet.
        absolute = found.pop("absolute_curvature", False)
        if found.get("optimizer") == "sophia_h" and not absolute:
            found["optimizer"] = "sophia_h_paper"
    if found.get("version", 1) < 3 and command_of(found) == "compare":
        found.setdefault("half", [])  # no optimizer took half of the steps
    return found


def stored(kind: type[Config], out: str | None) -> Config:
    """The settings of the run in a folder: the defaults of `--resume`.

    Raises:
      UsageError: there is no run of that kind, or its record is damaged.
    """
    folder = run_folder.existing(out)
    found = read(folder)
    command = command_of(found)
    if COMMANDS[command] is not kind:
        raise UsageError(
            f"{folder} was made by `{command}`. Resume it: {continuation(command, folder)}"
        )
    hints = typing.get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(kind):
        if field.name not in found or field.name in NOT_KEPT:
            continue
        value = found[field.name]
        if field.name == "mesh":
            value = mesh_of(folder, value)
        elif isinstance(value, list):
            value = tuple(value)
        if not fits(value, hints[field.name]):
            raise UsageError(
                f"{folder / run_folder.RECORD} is damaged: {field.name} is {value!r}. Restore it "
                "from a copy, or start with another --out."
            )
        values[field.name] = value
    return kind(**values)


COMMANDS = {"train": TrainConfig, "compare": CompareConfig, "tune": TuneConfig}


def command_of(found: dict[str, Any]) -> str:
    """The command that wrote a run.json."""
    if "optimizers" not in found:
        return "train"
    return "tune" if "tries" in found else "compare"


def on_these_devices(folder: Path, config: TrainConfig) -> TrainConfig:
    """The run with the mesh of all devices, where its own is for another number of them."""
    if config.mesh != mesh_of(folder, read(folder).get("mesh", {})):
        return config
    try:
        make_mesh(config.mesh)
    except UsageError:
        hosts.warn(
            f"the run began on a mesh of {dataclasses.astuple(config.mesh)} (data, fsdp, tensor) "
            f"and there are {jax.device_count()} devices now. It goes on with --mesh.data -1."
        )
        return dataclasses.replace(config, mesh=MeshConfig())
    return config


def mesh_of(folder: Path, value: Any) -> MeshConfig:
    """A mesh as run.json has it."""
    try:
        found = MeshConfig(**value)
        if all(type(size) is int for size in dataclasses.astuple(found)):
            return found
    except TypeError:
        pass
    raise UsageError(f"{folder / run_folder.RECORD} is damaged: mesh is {value!r}.")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that a flag has."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(isinstance(x, str) for x in value)
    if arguments:  # a union
        return any(fits(value, argument) for argument in arguments)
    if hint is float:
        return type(value) in (int, float)
    return value is None if hint is type(None) else type(value) is hint


def check_same_run(folder: Path, config: RunConfig, runs: dict[str, Run]) -> None:
    """Tells the user what differs between this run and the one in the folder.

    More steps, or tries of a search, are allowed; run.json then has the new number.

    Raises:
      UsageError: something else differs, and would change the numbers.
    """
    before, now = read(folder), settings(config, runs)
    # What may grow. A search's tries are compared at one number of steps.
    length = "steps" if isinstance(config, LoopConfig) else "tries"
    compared = {*before, *now} - FREE - {"version", "text", length}
    differences = [
        f"{name} was {before.get(name)} and is {now.get(name)}"
        for name in sorted(compared)
        if before.get(name, absent(name, config)) != run_folder.strict(now.get(name))
    ]
    wanted = getattr(config, length)
    had = before.get(length, wanted)
    if wanted < had:
        differences.append(f"{length} was {had} and is {wanted}")
    if differences:
        raise UsageError(
            f"{folder} holds another run: {'; '.join(differences)}. "
            "Resume it with its own settings, or choose another --out."
        )
    if wanted > had and jax.process_index() == 0:
        if length == "steps":
            print(
                f"The run goes on to {wanted} steps instead of {had}. From here on the learning "
                f"rate follows the schedule of a run of {wanted} steps, which is higher at the "
                "same step."
            )
        run_folder.write_json(folder / run_folder.RECORD, before | {length: wanted})


def absent(name: str, config: RunConfig) -> Any:
    """What a run did whose run.json is older than a flag: what the flag does if it is not given."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    default = defaults.get(name)
    return None if default is dataclasses.MISSING else default


def check_same_text(folder: Path, corpus: data.Corpus) -> None:
    """Warns of text that has changed since the run began."""
    before, now = read(folder).get("text"), data.fingerprint(corpus)
    if not isinstance(before, dict):  # a version that did not write it down
        return
    changed = [split for split in now if before.get(split) != now[split]]
    if changed:
        what = "; ".join(f"{split} had {before.get(split)}, has {now[split]}" for split in changed)
        hosts.warn(
            f"the data has changed since {folder} was begun ({what}). The run goes on with what is "
            "there now; its losses cannot be compared with the earlier ones."
        )
