"""A copy of examples/lm is a project of its own, which needs the installed library only."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import sophia_optax
from tests.trainer import worker

# The module as `python -m` runs it, where nothing of this repository can be imported.
ALONE = """
import runpy, sys
sys.modules["examples"] = None
sys.argv[0] = sys.argv.pop(1)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""

ROW = """
OPTIMIZERS["signum"] = dataclasses.replace(
    OPTIMIZERS["lion"], build=lambda h, schedule: optax.sign_sgd(schedule)
)
"""


def run_alone(parent: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The copy in a folder, with an installed `sophia_optax` and without its repository."""
    installed = parent / "site"
    installed.mkdir(exist_ok=True)
    if not (installed / "sophia_optax").exists():
        (installed / "sophia_optax").symlink_to(Path(sophia_optax.__file__).parent)
    path = os.pathsep.join([str(parent), str(installed)])
    return subprocess.run(
        [sys.executable, "-P", "-c", ALONE, *arguments],
        cwd=parent,
        env={**worker.environment(1), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_copy_of_the_folder_trains_with_the_optimizer_that_was_added_to_it(tmp_path):
    copy = tmp_path / "mytrainer"
    shutil.copytree(worker.ROOT / "examples" / "lm", copy)
    with (copy / "optimizers.py").open("a") as file:
        file.write(ROW)
    text = tmp_path / "my.txt"
    text.write_text("".join(f"{i} bottles of beer. " for i in range(500)))
    flags = f"--optimizer signum --data text:{text} --steps 3 --batch-size 2 --eval-batches 1"
    done = run_alone(tmp_path, "mytrainer", "train", *flags.split(), "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "signum ends at a validation loss of" in done.stdout
    helped = run_alone(tmp_path, "mytrainer", "--help")
    assert "usage: python -m mytrainer" in helped.stdout
