"""Checkpoints: the train state and the data's position, saved in the background, newest N kept."""

import contextlib
import hashlib
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from . import hosts, memory, run_folder
from .config import TrainConfig, UsageError
from .train import TrainState

DIGESTS = "digests.json"
UNFINISHED = ".orbax-checkpoint-tmp"
UNREADABLE = ".unreadable"

# What the file system, TensorStore and Orbax's waiting for other processes raise.
SAVE_ERRORS = (OSError, ValueError, RuntimeError)


class Checkpoints:
    """The checkpoints in a run's folder, for one configuration.

    Orbax writes each under a temporary name and renames it when it is whole, so that a process may
    be killed at any moment. Before that, the SHA-256 of each file is written into `digests.json`
    in the same folder: what has a step for its name can be read, and is checked when it is.

    Args:
      folder: the run's.
      config: the run.
      read_only: leave everything as it is, for readers beside a run that may still go on.
      run: its name among several in the folder; without one, it is alone.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, *, read_only: bool = False, run: str = ""
    ):
        self.config, self.folder, self.read_only, self.run = config, folder, read_only, run
        self.path = (folder / "checkpoints" / run).absolute()
        self.saving: int | None = None
        self.link: Path | None = None
        # Orbax logs four stacks for an error that it raises as well; `_failed` says it once.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        with run_folder.writing(self.path):
            self.manager = self._open()

    def save(self, step: int, state: TrainState, batches: Any) -> None:
        """Starts writing, once what was being written is on disk."""
        self.wait()
        self._remove_unfinished()
        if step in self.manager.all_steps():
            return
        items = {"state": ocp.args.StandardSave(state), "batches": ocp.args.JsonSave(batches)}
        self.saving = step
        refused = self._refusal()
        if refused is not None:
            self._failed(refused)
            return
        try:
            self.manager.save(step, args=ocp.args.Composite(**items))
        except SAVE_ERRORS as error:
            self._failed(error)

    def check(self) -> None:
        """Says or raises what has gone wrong in the background, without waiting for it."""
        if self.saving is not None and not self.manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns once all is on disk, or is known not to get there."""
        if self.saving is None:
            return
        try:
            self.manager.wait_until_finished()
        except SAVE_ERRORS as error:
            self._failed(error)
        self.saving = None

    def restore(self, abstract_state: TrainState) -> tuple[int, TrainState, Any] | None:
        """The newest whole checkpoint, in the shardings of `abstract_state`.

        Damaged ones that are newer get another name, once an older one has been read.

        Returns:
          Its step, the state and the data's position; None if the run was stopped before its first
          checkpoint.

        Raises:
          UsageError: there are checkpoints, or were, and none can be read. Nothing has changed.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        self._name_strangers()
        damaged: list[int] = []
        for step in steps:
            found = self._read(step, abstract_state)
            if isinstance(found, str):
                hosts.warn(
                    f"the checkpoint {self.path / str(step)} cannot be read ({found}). "
                    "Trying the one before."
                )
                damaged.append(step)
                continue
            self._set_aside(damaged)
            self._forget_lines_after(step)
            if not self.read_only and jax.process_index() == 0:
                print(f"Resuming after step {step}.")
            return step, found["state"], found["batches"]
        if steps:
            raise UsageError(
                f"No checkpoint in {self.path} can be read. Restore one from a copy, or start with "
                "another --out."
            )
        self._check_that_none_is_lost()
        self._forget_lines_after(0)
        return None

    def close(self) -> None:
        """Waits for what is being written and frees the threads."""
        try:
            self.wait()
        finally:
            self._remove_unfinished()
            self.manager.close()
            if self.link is not None:
                shutil.rmtree(self.link.parent, ignore_errors=True)

    def _open(self) -> ocp.CheckpointManager:
        """Orbax's manager of the folder."""
        several = jax.process_count() > 1
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self.config.keep,
            create=not self.read_only,
            cleanup_tmp_directories=not self.read_only,
            read_only=self.read_only,
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=self._write_digests,
                # Its threads would wait for five minutes for a folder that could not be made.
                create_directories_asynchronously=False,
                **({"barrier_sync_fn": self._meet} if several else {}),
            ),
        )
        return ocp.CheckpointManager(self._plain_path(), options=options)

    def _plain_path(self) -> Path:
        """The folder under a name without *, ?, [ and ], which Orbax takes for a pattern."""
        if not set("*?[]") & set(str(self.path)):
            return self.path
        if self.link is None:
            self.link = Path(tempfile.mkdtemp()) / "checkpoints"
            self.path.mkdir(parents=True, exist_ok=True)
            self.link.symlink_to(self.path, target_is_directory=True)
        return self.link

    def _meet(self, key: str, timeout_ms: int) -> None:
        """Waits for the other processes to have written as well, but not for ever."""
        longest = min(timeout_ms, 1000 * self.config.hosts.timeout)
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=longest)

    def _refusal(self) -> OSError | None:
        """Why nothing can be written just now; all processes agree, so that none waits in vain."""
        reason = None
        if jax.process_index() == 0:
            probe = self.path / f"{self.saving}{UNFINISHED}-probe"
            try:
                probe.mkdir()
                (probe / "file").write_bytes(b"\1" * 4096)
            except OSError as error:
                reason = error.strerror or str(error)
            finally:
                shutil.rmtree(probe, ignore_errors=True)
        reason = hosts.from_first(reason)
        return None if reason is None else OSError(reason)

    # --- digests ----------------------------------------------------------------------------------

    def _write_digests(self) -> None:
        """Called by Orbax in the background, when all is written and not yet renamed."""
        if jax.process_index() != 0:
            return
        for folder in self.path.glob(f"{self.saving}{UNFINISHED}*"):
            files = {name: sha256(folder / name) for name in data_files(folder)}
            run_folder.write_json(folder / DIGESTS, {"step": self.saving, "sha256": files})

    def _fault(self, step: int) -> tuple[bool, str | None]:
        """Whether the checkpoint has digests, and what in it is not as they say."""
        folder = self.path / str(step)
        if not (folder / DIGESTS).exists():  # it is from an earlier version
            return False, None
        try:
            written = run_folder.read_json(folder / DIGESTS)
            expected = dict(written["sha256"])
        except (UsageError, KeyError, TypeError, ValueError):
            return True, f"{DIGESTS} cannot be read"
        if written["step"] != step:
            return True, f"it was saved after step {written['step']}, and its folder was renamed"
        for name, digest in expected.items():
            path = folder / name
            if not path.is_file():
                return True, f"{name} is missing"
            if sha256(path) != digest:
                return True, f"{name} is not what was written (its SHA-256 differs)"
        return True, None

    # --- restoring --------------------------------------------------------------------------------

    def _read(self, step: int, abstract_state: TrainState) -> dict[str, Any] | str:
        """What the checkpoint holds, or in which way it is damaged.

        Raises:
          UsageError: it could not be read, and that is not the checkpoint's fault.
        """
        place = self.path / str(step)
        checked, fault = False, None
        with run_folder.reading(place):
            if jax.process_index() == 0:
                checked, fault = self._fault(step)
        checked, fault = hosts.from_first([checked, fault])
        if fault is not None:
            return fault
        items = {
            "state": ocp.args.StandardRestore(abstract_state),
            "batches": ocp.args.JsonRestore(),
        }
        try:
            restored = self.manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # whatever a torn file makes its reader raise
            if memory.ran_out(error):
                raise
            reason = first_line(error)
            if not checked:
                return reason
            raise UsageError(
                f"{place} is whole, as its digests say, and cannot be read ({reason}). Try again, "
                "or resume with the version of the code that wrote it; nothing was changed."
            ) from error
        if int(restored["state"].step) != step:
            return f"it holds the state after step {int(restored['state'].step)}"
        return dict(restored.items())

    def _name_strangers(self) -> None:
        """Warns of what lies among the checkpoints and is none."""
        for path in sorted(self.path.glob("*")):
            known = path.name.isdigit() or UNREADABLE in path.name or UNFINISHED in path.name
            if path.is_dir() and not known:
                hosts.warn(f"{path} is not named after a step, and not read.")

    def _check_that_none_is_lost(self) -> None:
        """A run without a checkpoint begins anew only where that costs no history."""
        others = [p.name for p in sorted(self.path.glob("*")) if UNFINISHED not in p.name]
        if others:
            raise UsageError(
                f"{self.path} holds no checkpoint of a step, but {', '.join(others)}. Give one its "
                "number as its name again, or start with another --out."
            )
        lines = run_folder.read_log(self.folder / run_folder.METRICS)
        steps = [line["step"] for line in lines if not self.run or line.get("run") == self.run]
        if max(steps, default=0) > 2 * self.config.save_interval:
            raise UsageError(
                f"{self.path} holds no checkpoint, and the run was at step {max(steps)}. Restore "
                "one from a copy, or start with another --out."
            )

    def _set_aside(self, damaged: list[int]) -> None:
        """Gives what cannot be read other names, so that their steps can be saved again."""
        if self.read_only or not damaged:
            return
        if jax.process_index() == 0:
            for step in damaged:
                aside = self.path / f"{step}{UNREADABLE}"
                shutil.rmtree(aside, ignore_errors=True)
                with run_folder.writing(aside):
                    (self.path / str(step)).rename(aside)
        multihost_utils.sync_global_devices(f"set aside {damaged}")
        self.manager.reload()

    def _forget_lines_after(self, steps: int) -> None:
        """Takes what the resumed run logs again out of the log."""
        if not self.read_only and jax.process_index() == 0:
            run_folder.forget_lines_after(self.folder / run_folder.METRICS, steps, self.run or None)

    # --- failing ----------------------------------------------------------------------------------

    def _remove_unfinished(self) -> None:
        """Half a checkpoint is of no use and takes room. Only while nothing is being written."""
        if jax.process_index() == 0 and not self.read_only:
            for unfinished in self.path.glob(f"*{UNFINISHED}*"):
                shutil.rmtree(unfinished, ignore_errors=True)

    def _failed(self, error: Exception) -> None:
        """Says that nothing was saved, or ends the run."""
        step, self.saving = self.saving, None
        self._remove_unfinished()
        if jax.process_count() == 1:
            # What a failed save leaves in the old one is never cleaned up. Of several processes,
            # the others may not know yet that it failed, and opening waits for them.
            with contextlib.suppress(*SAVE_ERRORS):
                self.manager.close()
            self.manager = self._open()
        message = (
            f"the checkpoint after step {step} could not be saved ({first_line(error)}); the "
            "older ones are kept."
        )
        if self.config.on_save_error == "stop":
            raise UsageError(f"Stopped: {message} Free some space and --resume.") from error
        hosts.warn(message)


def data_files(folder: Path) -> list[str]:
    """The files of a checkpoint, but for the one that Orbax rewrites when it renames the folder."""
    files = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return sorted(p.as_posix() for p in files if not p.name.startswith("_CHECKPOINT_METADATA"))


def sha256(path: Path) -> str:
    """The file's digest."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: Exception) -> str:
    """What the error says, in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
