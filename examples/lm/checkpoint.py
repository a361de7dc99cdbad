"""Checkpoints: the train state and the data's position, saved in the background, newest N kept."""

import dataclasses
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from examples.lm.config import TrainConfig, UsageError
from examples.lm.optimizers import hyperparameters
from examples.lm.train import TrainState

# What may differ between a run and its continuation: none of it changes the numbers.
FREE = {
    *("mesh", "hosts", "refresh", "remat", "attention", "out", "resume", "log_interval"),
    *("save_interval", "keep", "on_save_error", "eval_interval", "eval_batches"),
}


class Checkpoints:
    """The checkpoints in a run's folder, for one configuration.

    Orbax writes each under a temporary name and renames it when it is whole, so that a process may
    be killed at any moment: what has a step for its name can be read.

    Args:
      folder: the run's.
      config: the run.
      read_only: leave everything as it is, for readers beside a run that may still go on.
    """

    def __init__(self, folder: Path, config: TrainConfig, *, read_only: bool = False):
        self.config, self.folder, self.read_only = config, folder, read_only
        self.record = folder / "run.json"
        self.path = (folder / "checkpoints").absolute()
        self.saving: int | None = None
        # Orbax logs four stacks for an error that it raises as well; `_failed` says it once.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        self.manager = ocp.CheckpointManager(self.path, options=options)

    def describe(self) -> None:
        """Writes down what run this is, for `check_same_run`."""
        if jax.process_index() == 0:
            self.record.write_text(json.dumps(identity(self.config), indent=2) + "\n")

    def check_same_run(self) -> None:
        """Tells the user what differs between this run and the one in the folder."""
        before, now = json.loads(self.record.read_text()), identity(self.config)
        differences = [
            f"{name} was {before.get(name)} and is {now.get(name)}"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
        if differences:
            raise UsageError(
                f"{self.record.parent} holds another run: {'; '.join(differences)}. "
                "Resume it with its own settings, or choose another --out."
            )

    def save(self, step: int, state: TrainState, batches: Any) -> None:
        """Starts writing, once what was being written is on disk."""
        self.wait()
        self._remove_unfinished()
        if step in self.manager.all_steps():
            return
        items = {"state": ocp.args.StandardSave(state), "batches": ocp.args.JsonSave(batches)}
        self.saving = step
        try:
            self.manager.save(step, args=ocp.args.Composite(**items))
        except (OSError, ValueError) as error:
            self._failed(error)

    def check(self) -> None:
        """Says or raises what has gone wrong in the background, without waiting for it."""
        if self.saving is not None and not self.manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns once all is on disk, or is known not to get there."""
        try:
            self.manager.wait_until_finished()
        except (OSError, ValueError) as error:  # the second from TensorStore, for all that failed
            self._failed(error)
        self.saving = None

    def restore(self, abstract_state: TrainState) -> tuple[int, TrainState, Any] | None:
        """The newest checkpoint that can be read, in the shardings of `abstract_state`.

        None if the run was stopped before its first one.
        """
        items = {
            "state": ocp.args.StandardRestore(abstract_state),
            "batches": ocp.args.JsonRestore(),
        }
        steps = sorted(self.manager.all_steps(), reverse=True)
        for step in steps:
            try:
                restored = self.manager.restore(step, args=ocp.args.Composite(**items))
            except Exception as error:  # whatever a torn file makes its reader raise
                self._set_aside(step, error)
                continue
            self._forget_lines_after(step)
            if jax.process_index() == 0 and not self.read_only:
                print(f"Resuming after step {step}.")
            return step, restored["state"], restored["batches"]
        if steps:
            raise UsageError(f"No checkpoint in {self.path} can be read. Start with another --out.")
        self._forget_lines_after(0)
        return None

    def close(self) -> None:
        """Waits for what is being written and frees the threads."""
        self.wait()
        self._remove_unfinished()
        self.manager.close()

    def _remove_unfinished(self) -> None:
        """Half a checkpoint is of no use and takes room. Only while nothing is being written."""
        if jax.process_index() == 0 and not self.read_only:
            for unfinished in self.path.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)

    def _set_aside(self, step: int, error: Exception) -> None:
        """Gives what cannot be read another name, so that its step can be saved again."""
        torn = self.path / str(step)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        print(
            f"Warning: the checkpoint {torn} cannot be read ({reason}). Trying the one before.",
            file=sys.stderr,
        )
        if self.read_only:
            return
        if jax.process_index() == 0:
            aside = self.path / f"{step}.unreadable"
            shutil.rmtree(aside, ignore_errors=True)
            torn.rename(aside)
        multihost_utils.sync_global_devices(f"set aside {step}")
        self.manager.reload()

    def _forget_lines_after(self, steps: int) -> None:
        """Takes what came after `steps` steps out of the log: the resumed run logs it again."""
        path = self.folder / "metrics.jsonl"
        if self.read_only or jax.process_index() != 0 or not path.exists():
            return
        whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
        records = [json.loads(line) for line in whole]
        kept = [r for r in records if r["step"] < steps + ("val_loss" in r)]
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def _failed(self, error: Exception) -> None:
        self._remove_unfinished()
        reason = str(error).splitlines()[0].rstrip(".")
        message = (
            f"the checkpoint after step {self.saving} could not be saved ({reason}); the older "
            "ones are kept."
        )
        if self.config.on_save_error == "stop":
            raise UsageError(f"Stopped: {message} Free some space and --resume.") from error
        print(f"Warning: {message}", file=sys.stderr)


def identity(config: TrainConfig) -> dict[str, Any]:
    """All settings that a resumed run must share, with the optimizer's defaults filled in."""
    settings = dataclasses.asdict(config) | dataclasses.asdict(hyperparameters(config))
    return {name: value for name, value in settings.items() if name not in FREE}
