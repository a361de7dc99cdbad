"""Runs of the trainer that are small, quick to compile, and interrupted where a test wants it.

python -m tests.trainer.worker '{"stop_after": 3}' train --model micro ...
"""

import contextlib
import dataclasses
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from examples.lm import compare, generate, report
from examples.lm.__main__ import main
from examples.lm.config import MODELS, HostConfig, LoopConfig, ModelConfig, RunConfig
from examples.lm.run import Run
from examples.lm.train import Trainer

ROOT = Path(__file__).parents[2]
MICRO = ModelConfig(layers=1, width=16, heads=2, context=16, vocab_size=256, init_scale=0.1)
RUN = shlex.split(
    "train --model micro --optimizer sophia_g --steps 12 --batch-size 8 --curvature-batch 8 "
    "--log-interval 1 --save-interval 4 --eval-interval 12 --eval-batches 1"
)

# Most of a test's time would go into compiling the same step again, and into making it fast.
COMPILATION = {
    "jax_disable_most_optimizations": True,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def steps_of(folder: Path) -> set[int]:
    """The checkpoints that count as whole."""
    return {int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()}


@contextlib.contextmanager
def quick_compilation(cache: Path) -> Iterator[None]:
    """Inside, a step is compiled once, with little effort, and found in the cache by the others."""
    settings = {**COMPILATION, "jax_compilation_cache_dir": str(cache)}
    before = {name: jax.config.values[name] for name in settings}
    try:
        compilation_cache.reset_cache()
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@functools.cache
def compiled_trainer(run: Run) -> Trainer:
    """The trainer of a run, traced and lowered once in this process."""
    return Trainer(run)


def shared_trainer(run: Run) -> Trainer:
    """The trainer of a run, shared with those that differ in nothing that a step depends on."""
    fields = dataclasses.fields(LoopConfig)
    loop = {f.name: f.default for f in fields if f.name not in RunConfig.__dataclass_fields__}
    loop.update(hosts=HostConfig(), out=None, resume=False, data="", eval_batches=1)
    config = dataclasses.replace(run.config, **loop)
    return compiled_trainer(dataclasses.replace(run, config=config)).at(run)


def run(
    arguments: list[str],
    stop_after: int | None = None,
    pause: float = 0.0,
    late: float = 0.0,
    seen: Callable[[int], None] = lambda step: None,
) -> int:
    """`main` with a micro preset.

    Args:
      arguments: the command line.
      stop_after: the step after whose log line SIGTERM comes.
      pause: seconds that every line takes, so that a run is not over before it is disturbed.
      late: seconds that compiling the step takes longer.
      seen: called with the step of every training line.
    """

    def tracker(*args: Any, make: Any = report.tracker) -> Any:
        log = make(*args)

        def disturbed(record: dict[str, float]) -> None:
            log(record)
            time.sleep(pause)
            if "loss" in record:
                seen(int(record["step"]))
                if record["step"] == stop_after:
                    os.kill(os.getpid(), signal.SIGTERM)

        return disturbed

    def slow_to_compile(*args: Any, step: Any = Trainer.train_step) -> Any:
        time.sleep(late)
        return step(*args)

    with pytest.MonkeyPatch.context() as patch:
        if late:
            patch.setattr(Trainer, "train_step", slow_to_compile)
        patch.setitem(MODELS, "micro", MICRO)
        patch.setattr(report, "tracker", tracker)
        patch.setattr(compare, "Trainer", shared_trainer)
        patch.setattr(generate, "Trainer", shared_trainer)
        return main(arguments)


def environment(devices: int, **settings: Any) -> dict[str, str]:
    """A process's, for as many CPU devices; `settings` are JAX's."""
    settings = {**COMPILATION, **settings, "jax_num_cpu_devices": devices, "jax_platforms": "cpu"}
    return {**os.environ, **{name.upper(): str(value) for name, value in settings.items()}}


def start(arguments: list[str], devices: int, cache: Path, **how: float) -> subprocess.Popen:
    """`run` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.trainer.worker", json.dumps(how), *arguments],
        cwd=ROOT,
        env=environment(devices, jax_compilation_cache_dir=cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


if __name__ == "__main__":
    sys.exit(run(sys.argv[2:], **json.loads(sys.argv[1])))
