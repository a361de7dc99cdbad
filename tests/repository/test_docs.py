"""The documentation keeps its word: its code runs, and every public name has its place in it."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.repository import pages
from tests.repository.pages import ROOT

PACKAGE = ROOT / "sophia_optax"
API = (ROOT / "docs/api.md").read_text()
BENCHMARKS = (ROOT / "docs/benchmarks.md").read_text()
RESULTS = sorted(
    [*ROOT.glob("benchmarks/results/*.json"), *ROOT.glob("benchmarks/results/*.jsonl")]
)
# Shares in percent, and units with a prefix, the binary ones too.
SCALES = (1, 1e2, 1e3, 1e-3, 1e-6, 1e-9, 1e-12, 2**-10, 2**-20, 2**-30)
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


def test_every_page_is_in_the_navigation() -> None:
    assert sorted(NAVIGATION) == [str(page.relative_to(ROOT / "docs")) for page in pages.DOCS]


@pytest.mark.parametrize("page", [pages.README, *pages.DOCS], ids=lambda page: page.name)
def test_every_block_has_a_language_and_no_python_hides_under_another(page: Path) -> None:
    assert {block.language for block in pages.blocks(page)} <= {
        "python",
        "text",
        "sh",
        "yaml",
        "bibtex",
    }


def numbers(node: Any) -> Iterator[float]:
    """All numbers in what a JSON file holds."""
    if isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from numbers(child)
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield float(node)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_have_a_section_whose_tables_show_roundings_of_their_numbers(path: Path) -> None:
    sections = [section for section in BENCHMARKS.split("\n## ") if path.name in section]
    assert sections, f"docs/benchmarks.md has no section on {path.name}"
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    known = [number for line in lines for number in numbers(json.loads(line))]
    rows = [row for section in sections for row in section.splitlines() if row.startswith("|")]
    for cell in (cell for row in rows[2:] for cell in row.split("|")[2:]):
        for text in re.findall(r"\d[\d,]*\.?\d*(?:e-?\d+)?", re.sub(r"`[^`]*`", "", cell)):
            number = float(text.replace(",", "").rstrip("."))
            half_a_digit = 0.5000001 * 10.0 ** -len(text.partition(".")[2])
            gaps = (abs(value * scale - number) for value in known for scale in SCALES)
            assert any(gap <= half_a_digit for gap in gaps), f"{cell}: {text}"


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


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings_handlers", reason="the site needs the extra 'docs'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api" / "index.html").read_text()
    assert 'id="sophia_optax.sophia_g"' in page
    assert "Examples:" in page, "the docstrings' examples are sections with code"


@pytest.mark.parametrize(
    "code, text, fault",
    [
        ("print('a')", "b", AssertionError),
        ("1 / 0", "", ZeroDivisionError),
        ("import no_such", "", None),
    ],
)
def test_a_page_that_does_not_keep_its_word_is_found(
    tmp_path: Path, code: str, text: str, fault: type[Exception] | None
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```python\n{code}\n```\n\n```text\n{text}\n```\n")
    if fault is None:
        assert pages.run(page) == {"no_such"}
    else:
        with pytest.raises(fault):
            pages.run(page)
