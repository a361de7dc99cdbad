"""Where a figure comes from: the machine, the versions, the commit, the command."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")

PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")


def commit() -> str:
    """The checkout's commit, with a plus where files differ from it; empty outside of one."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def provenance(module: str) -> dict[str, Any]:
    """What a results file begins with.

    Args:
      module: the module that was run, as after `python -m`.

    Returns:
      The command, the commit, versions and machine.
    """
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": sys.platform},
    }
