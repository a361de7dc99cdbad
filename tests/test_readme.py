"""The README keeps its word: its code runs, its defaults are those of the code, its tests exist."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import sophia_optax

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def table(title: str) -> list[list[str]]:
    """The cells of the first table below a heading, its header left out."""
    section = README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def names_of_tests() -> set[str]:
    return {
        node.name
        for path in ROOT.glob("tests/test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run_one_after_another(page: Path) -> None:
    namespace = {"__name__": page.stem}
    for number, block in enumerate(code_blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)
        if page.name == "README.md":
            assert namespace.pop("loss") < 0.6, "the quickstarts start at log 3 and learn"


def test_the_two_commands_stand_in_it() -> None:
    (commands,) = code_blocks(ROOT / "README.md", "sh")
    assert commands.splitlines() == [
        "pip install -e '.[examples]' && python -m examples.lm compare",
        "pip install -e '.[test]' && python -m pytest",
    ]


def test_every_row_of_works_with_names_a_test() -> None:
    rows = table("Works with")
    assert rows
    for what, shown_by in rows:
        assert re.fullmatch(r"`test_\w+`", shown_by), what


def test_every_test_named_exists() -> None:
    named = set(re.findall(r"\btest_\w+\b(?!\.py)", README))
    assert named - names_of_tests() == set()


def test_hyperparameters_are_those_of_the_code() -> None:
    h = inspect.signature(sophia_optax.sophia_h).parameters
    g = inspect.signature(sophia_optax.sophia_g).parameters
    described = {name.strip("`"): default for name, default, *_ in table("Hyperparameters")}
    assert described.pop("learning_rate") == "none"
    assert described.pop("gamma") == f"{h['gamma'].default} (H), {g['gamma'].default} (G)"
    for name, default in described.items():
        value = ast.literal_eval(default)
        assert value == h[name].default == g[name].default, name
    numeric = {name for name, p in g.items() if isinstance(p.default, bool | int | float)}
    assert numeric - {"gamma", "seed"} == set(described)
