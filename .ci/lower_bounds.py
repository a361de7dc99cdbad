"""Prints pip constraints that hold the dependencies of the core and examples at their bounds."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for requirement in project["dependencies"] + extras["examples"]:
    if not (match := re.fullmatch(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", requirement)):
        raise SystemExit(f"{requirement!r} has no plain lower bound.")
    print(f"{match[1]}=={match[2]}")
