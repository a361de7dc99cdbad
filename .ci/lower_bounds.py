"""Prints pip constraints that hold the dependencies of core, examples and tests at their bounds."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for requirement in project["dependencies"] + extras["examples"] + extras["test"]:
    if match := re.fullmatch(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", requirement):
        print(f"{match[1]}=={match[2]}")
    elif not requirement.startswith("sophia_optax["):
        raise SystemExit(f"{requirement!r} has no plain lower bound.")
