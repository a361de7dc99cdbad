"""The README is right: its code runs, its defaults are those of the code, its tests exist."""

import ast
import inspect
import re

import sophia_optax
from tests.repository import pages
from tests.repository.pages import ROOT

README = pages.README.read_text()
WORKS_WITH = (ROOT / "docs/works-with.md").read_text()


def table(text: str, title: str) -> list[list[str]]:
    """The cells of the first table below a heading, its header left out."""
    section = text.split(f"# {title}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def names_of_tests() -> set[str]:
    return {
        node.name
        for path in ROOT.glob("tests/**/test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 120


def test_python_blocks_run_one_after_another() -> None:
    assert pages.run(pages.README) == set()


def test_the_three_commands_stand_in_it() -> None:
    (commands,) = pages.code_blocks(pages.README, "sh")
    assert commands.splitlines() == [
        "pip install -e '.[examples]' && python -m examples.lm compare",
        "python -m examples.lm compare --data text:my.txt",
        "pip install -e '.[test]' && python -m pytest",
    ]


def test_every_row_of_works_with_names_a_test() -> None:
    rows = table(WORKS_WITH, "Works with")
    assert rows
    for what, shown_by in rows:
        assert re.fullmatch(r"`test_\w+`", shown_by), what


def test_every_test_named_exists() -> None:
    text = "".join(page.read_text() for page in [pages.README, *pages.DOCS])
    named = set(re.findall(r"\btest_\w+\b", text))
    files = {file.stem for file in (pages.ROOT / "tests").rglob("test_*.py")}
    assert named - names_of_tests() - files == set()


def test_hyperparameters_are_those_of_the_code() -> None:
    h = inspect.signature(sophia_optax.sophia_h).parameters
    g = inspect.signature(sophia_optax.sophia_g).parameters
    rows = table(README, "Set the hyperparameters")
    described = {name.strip("`"): default for name, default, *_ in rows}
    assert described.pop("learning_rate") == "none"
    assert g["gamma"].default == sophia_optax.win_rate_target(0.8, weighted=True)
    target = "`win_rate_target(0.8, weighted=True)`"
    assert described.pop("gamma") == f"{h['gamma'].default} (H), {target} (G)"
    for name, default in described.items():
        value = ast.literal_eval(default)
        assert value == h[name].default == g[name].default, name
    numeric = {name for name, p in g.items() if isinstance(p.default, bool | int | float)}
    assert numeric - {"gamma", "seed"} == set(described)
