"""The documentation is right: its code runs, and the reference has every public name."""

import ast
import base64
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.repository import pages
from tests.repository.pages import ROOT

PACKAGE = ROOT / "sophia_optax"
API = (ROOT / "docs/api.md").read_text()
FROM_ADAMW = "docs/how-to/from-adamw"
NAVIGATION = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)


def public_names() -> set[str]:
    """What `sophia_optax` exports and what its optional modules define, with the modules' names."""
    exported = {
        f"sophia_optax.{alias.asname}"
        for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return exported | {
        f"sophia_optax.{module.stem}.{node.name}"
        for module in PACKAGE.glob("[a-z]*.py")
        for node in ast.parse(module.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }


@pytest.mark.parametrize("page", pages.DOCS, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run_one_after_another_and_print_what_stands_below(page: Path) -> None:
    if absent := pages.run(page):
        pytest.skip(f"blocks of {page.name} were left out for want of {', '.join(sorted(absent))}")


def test_the_reference_has_every_public_name_once_and_no_other() -> None:
    names = re.findall(r"^::: (\S+)$", API, re.MULTILINE)
    assert len(set(names)) == len(names)
    assert set(names) == public_names()


def test_every_page_and_every_notebook_is_in_the_navigation_once() -> None:
    written = [str(page.relative_to(ROOT / "docs")) for page in pages.DOCS]
    notebooks = [f"notebooks/{path.stem}.md" for path in ROOT.glob("notebooks/[0-9]*.ipynb")]
    assert sorted(NAVIGATION) == sorted(written + notebooks)


@pytest.mark.parametrize("page", [pages.README, *pages.DOCS], ids=lambda page: page.name)
def test_every_block_has_a_language_and_no_python_hides_under_another(page: Path) -> None:
    assert {block.language for block in pages.blocks(page)} <= {
        "python",
        "diff",
        "text",
        "sh",
        "yaml",
        "bibtex",
    }


def test_the_loops_before_and_after_the_move_from_adamw_learn() -> None:
    (diff,) = pages.code_blocks(ROOT / f"{FROM_ADAMW}.md", "diff")
    assert sum(line.startswith("+") for line in diff.splitlines()) == 6, "the page says six"
    for code in pages.sides(diff):
        namespace: dict[str, Any] = {}
        exec(code, namespace)
        assert namespace["loss"] < 0.7


@pytest.mark.parametrize("page", [pages.README, *pages.DOCS], ids=lambda page: page.name)
def test_every_module_that_a_command_runs_exists(page: Path) -> None:
    for module in re.findall(r"python -m ((?:examples|benchmarks)[\w.]*)", page.read_text()):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize("page", [pages.README, *pages.DOCS], ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"\b((?:benchmarks|examples|tests|notebooks)/[\w./-]*\w)", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", ["README", "docs/index", "docs/concepts/estimators", FROM_ADAMW])
def test_the_advice_on_optimizers_is_on_one_page_and_the_others_link_to_it(name: str) -> None:
    text = (ROOT / f"{name}.md").read_text()
    assert "choosing-hyperparameters.md#choose-the-optimizer" in text


@pytest.mark.parametrize("page", [pages.README, *pages.DOCS], ids=lambda page: page.name)
def test_every_picture_and_every_linked_file_exists(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_the_picture_of_the_first_page_is_a_figure_of_the_first_notebook() -> None:
    notebook = (ROOT / "notebooks/01_sophia_from_scratch.ipynb").read_text()
    picture = base64.b64encode((ROOT / "docs/images/landscape.png").read_bytes()).decode()
    assert picture in notebook.replace("\\n", "")


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings_handlers", reason="the site needs the extra 'docs'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api" / "index.html").read_text()
    assert 'id="sophia_optax.sophia_g"' in page
    assert "Examples:" in page, "the docstrings' examples are sections with code"
    assert not re.findall("<code>[^<]*`[^<]*", page), "a colon made a type of a sentence"
    notebook = (tmp_path / "notebooks/01_sophia_from_scratch/index.html").read_text()
    assert "<math" in notebook
    assert "arithmatex" not in notebook, "every formula is MathML"
    assert 'class="language-text printed' in notebook, "what a cell printed is not wrapped"
    advice = (tmp_path / "choosing-hyperparameters/index.html").read_text()
    assert 'class="language-text highlight"' in advice, "other text wraps"
    cells = " ".join(re.findall("<t[dh]>.*?</t[dh]>", advice))
    assert "Sophia-G" in cells
    assert "Sophia-" not in re.sub('class="whole">Sophia-[GH]<', "", cells), "no name is split"
    assert (tmp_path / "results/lm_race.png").is_file()


@pytest.mark.parametrize(
    "code, text, fault",
    [
        ("print('a')", "b", AssertionError),
        ("1 / 0", "", ZeroDivisionError),
        ("import no_such", "", None),
    ],
)
def test_a_page_with_wrong_output_or_broken_code_is_found(
    tmp_path: Path, code: str, text: str, fault: type[Exception] | None
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```python\n{code}\n```\n\n```text\n{text}\n```\n")
    if fault is None:
        assert pages.run(page) == {"no_such"}
    else:
        with pytest.raises(fault):
            pages.run(page)
