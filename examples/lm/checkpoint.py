"""Checkpoints: the train state and the data's position, saved in the background, newest N kept."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from examples.lm.config import TrainConfig, UsageError
from examples.lm.optimizers import hyperparameters
from examples.lm.train import TrainState

# What may differ between a run and its continuation: none of it changes the numbers.
FREE = {
    *("mesh", "hosts", "refresh", "remat", "attention", "out", "resume", "log_interval"),
    *("save_interval", "keep", "on_save_error", "eval_interval", "eval_batches"),
}


class Checkpoints:
    """The checkpoints in a run's folder, for one configuration."""

    def __init__(self, folder: Path, config: TrainConfig):
        self.config, self.folder = config, folder
        self.record = folder / "run.json"
        self.path = (folder / "checkpoints").absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=config.keep, create=True)
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

    def save(self, step: int, state: TrainState, batches: dict[str, Any]) -> None:
        """Starts writing; a failure leaves the older checkpoints and is said or raised."""
        if step in self.manager.all_steps():
            return
        items = {"state": ocp.args.StandardSave(state), "batches": ocp.args.JsonSave(batches)}
        try:
            self.manager.save(step, args=ocp.args.Composite(**items))
        except OSError as error:
            self._failed(error)

    def wait(self) -> None:
        """Returns once all is on disk."""
        try:
            self.manager.wait_until_finished()
        except OSError as error:
            self._failed(error)

    def restore(self, abstract_state: TrainState) -> tuple[int, TrainState, dict[str, Any]]:
        """The newest checkpoint that can be read, in the shardings of `abstract_state`."""
        items = {
            "state": ocp.args.StandardRestore(abstract_state),
            "batches": ocp.args.JsonRestore(),
        }
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                restored = self.manager.restore(step, args=ocp.args.Composite(**items))
                drop_lines_after(self.folder / "metrics.jsonl", step)
                return step, restored["state"], restored["batches"]
            except Exception as error:  # whatever a torn file makes its reader raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                print(
                    f"Warning: the checkpoint {self.path / str(step)} cannot be read ({reason}). "
                    "Trying the one before.",
                    file=sys.stderr,
                )
                self.manager.delete(step)
        raise UsageError(f"{self.path} holds no checkpoint to resume from. Leave out --resume.")

    def close(self) -> None:
        """Waits for what is being written and frees the threads."""
        self.wait()
        self.manager.close()

    def _failed(self, error: OSError) -> None:
        message = f"the checkpoint could not be saved ({error}); the older ones are kept."
        if self.config.on_save_error == "stop":
            raise UsageError(f"Stopped: {message} Free some space and --resume.") from error
        print(f"Warning: {message} Training goes on.", file=sys.stderr)


def drop_lines_after(path: Path, steps: int) -> None:
    """Forgets what was logged after `steps` steps: the resumed run logs it again."""
    if jax.process_index() != 0 or not path.exists():
        return
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
    records = [json.loads(line) for line in whole]
    kept = [r for r in records if r["step"] < steps + ("val_loss" in r)]
    path.write_text("".join(json.dumps(record) + "\n" for record in kept))


def identity(config: TrainConfig) -> dict[str, Any]:
    """All settings that a resumed run must share, with the optimizer's defaults filled in."""
    settings = dataclasses.asdict(config) | dataclasses.asdict(hyperparameters(config))
    return {name: value for name, value in settings.items() if name not in FREE}
