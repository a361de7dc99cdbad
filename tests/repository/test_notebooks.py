"""The notebooks as committed: executed, without errors, with the cells of their sources."""

import importlib.util
import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted(path.with_suffix(".ipynb") for path in FOLDER.glob("[0-9]*.py"))

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def outputs(path: Path) -> list[dict[str, Any]]:
    return [output for cell in code_cells(path) for output in cell["outputs"]]


def printed(path: Path) -> str:
    """All text of the outputs, without images."""
    parts = []
    for output in outputs(path):
        parts.append("".join(output.get("text", "")))
        data = output.get("data", {})
        parts += ["".join(data[kind]) for kind in ("text/plain", "text/html") if kind in data]
    return "\n".join(parts)


def test_a_notebook_has_the_cells_of_the_source_beside_it(path: Path) -> None:
    jupytext = pytest.importorskip("jupytext", reason="needs the extra 'notebooks'")
    source = jupytext.read(path.with_suffix(".py"))
    saved = [(cell["cell_type"], "".join(cell["source"])) for cell in read(path)["cells"]]
    assert saved == [(cell.cell_type, cell.source) for cell in source.cells]


def test_a_notebook_was_run_once_from_its_first_cell_to_its_last(path: Path) -> None:
    counts = [cell["execution_count"] for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))


def test_no_output_is_an_error_or_a_warning(path: Path) -> None:
    assert not [output for output in outputs(path) if output["output_type"] == "error"]
    assert not [output for output in outputs(path) if output.get("name") == "stderr"]


def test_the_figures_are_there(path: Path) -> None:
    drawn = []
    for cell in code_cells(path):
        code = "".join(cell["source"])
        kinds = {kind for output in cell["outputs"] for kind in output.get("data", {})}
        drawn += kinds & {"image/png", "text/html"}
        if re.search(
            r"^(plt\.show|sophia_optax\.plotting\.\w+\(|jax\.debug\.visualize)", code, re.M
        ):
            assert kinds & {"image/png", "text/html"}, code
    assert drawn


def test_no_output_names_a_place_on_the_machine_that_made_it(path: Path) -> None:
    assert not re.search(r"(/home/|/root/|/tmp/|/Users/|site-packages|C:\\)", printed(path))
    assert str(ROOT) not in printed(path)


@pytest.mark.parametrize(
    "source, files, wanted",
    [
        ("", [], "sophia_optax"),
        ("", ["sophia_optax-0.1.0-py3-none-any.whl"], "sophia_optax-0.1.0-py3-none-any.whl"),
        ("git+https://example.org/sophia_optax", [], "git+https://example.org/sophia_optax"),
    ],
)
def test_the_first_cell_installs_what_is_there(
    path: Path, source: str, files: list[str], wanted: str, tmp_path: Path, monkeypatch
) -> None:
    cell = "".join(code_cells(path)[0]["source"])
    install = cell[: cell.index("check=True)")] + "check=True)"
    commands: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in files:
        (tmp_path / "work" / name).touch()
    exec(install.replace('SOURCE = ""', f"SOURCE = {source!r}"), {})
    (command,) = commands
    assert command[5] == wanted


def test_the_first_cell_stops_where_an_old_version_is_loaded(path: Path, monkeypatch) -> None:
    cell = "".join(code_cells(path)[0]["source"])
    install = cell[: cell.index("\n\nimport", cell.index("check=True)"))]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: None)
    exec(install, {})  # what is loaded is what is installed
    monkeypatch.setattr(np, "__version__", "1.0")
    with pytest.raises(SystemExit, match="numpy was loaded before: restart"):
        exec(install, {})


def test_the_first_cell_asks_for_the_versions_that_the_project_needs(path: Path) -> None:
    (packages,) = re.findall(r"packages = \[SOURCE or found\[0\](.*)\]", path.read_text())
    wanted = re.findall(r'\\"(.*?)\\"', packages)
    assert wanted
    assert set(wanted) <= set(PROJECT["optional-dependencies"]["examples"])


def test_the_badge_opens_the_notebook_where_the_repository_is_public(path: Path) -> None:
    title = "".join(read(path)["cells"][0]["source"])
    (target,) = re.findall(r"badge\.svg\)\]\((.*?)\)", title)
    repository = PROJECT["urls"].get("Repository")
    if repository is None:
        assert target == "https://colab.research.google.com/"
        assert "Upload notebook" in title
    else:
        name = repository.removeprefix("https://github.com/")
        opened = f"github/{name}/blob/main/notebooks/{path.name}"
        assert target == f"https://colab.research.google.com/{opened}"


def test_links_to_other_files_lead_somewhere(path: Path) -> None:
    text = "".join(
        "".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "markdown"
    )
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"):
            assert (FOLDER / link).exists(), link
    for name in re.findall(r"`((?:benchmarks|examples|tests|docs)/[\w./-]*\w)", text):
        assert (ROOT / name).exists(), name
