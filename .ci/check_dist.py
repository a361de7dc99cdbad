"""Checks the built wheel and sdist: what is in them, and what they say of themselves.

Usage: check_dist.py FOLDER, from the project's root.
"""

import email
import re
import sys
import tarfile
import zipfile
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("*.whl")
(sdist,) = Path(sys.argv[1]).glob("*.tar.gz")
(version,) = re.findall(
    r'^__version__ = "(.*)"$', Path("sophia_optax/__init__.py").read_text(), re.M
)


def files(*folders: str) -> set[str]:
    """The files of the tree, without what is made by running it."""
    found = (path for folder in folders for path in Path(folder).rglob("*") if path.is_file())
    made = re.compile(r"/(__pycache__|\.[^/]+)/")
    return {str(path) for path in found if not made.search(str(path))}


with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
    info = f"sophia_optax-{version}.dist-info"
    metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
extra = {name for name in names if not name.startswith(f"{info}/")} ^ files("sophia_optax")
assert not extra, f"the wheel and the package differ: {extra}"
assert f"{info}/licenses/LICENSE" in names

assert metadata["Name"] == "sophia_optax"
assert metadata["Version"] == version
assert metadata["License-Expression"] == "Apache-2.0"
assert metadata["Description-Content-Type"] == "text/markdown"
assert metadata["Requires-Python"] == ">=3.11"
dependencies = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
assert len(dependencies) == 3, dependencies

with tarfile.open(sdist) as archive:
    members = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
wanted = files("sophia_optax", "tests", "examples", "benchmarks", "docs", "notebooks") | {
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "mkdocs.yml",
    "pyproject.toml",
}
assert not wanted - members, f"the sdist lacks {wanted - members}"
print(f"{wheel.name}: {len(names)} files; {sdist.name}: {len(members)} files")
