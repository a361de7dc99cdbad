"""README and docs quote the results: no number differs from its file, and none is made up."""

import random
import re
from pathlib import Path

import pytest

from benchmarks.tables import pages
from benchmarks.tables.formats import RESULTS
from tests.repository.pages import ROOT

TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in pages.pages()}
BENCHMARKS = TEXTS["docs/benchmarks.md"]
GENERATED = [(page, name) for name, where in pages.places(TEXTS).items() for page in where]


def table_of(text: str, name: str) -> re.Match[str]:
    """The text between the marks of a table."""
    found = re.search(rf"(?<=<!-- table: {name} -->).*?(?=<!-- /table -->)", text, re.DOTALL)
    assert found
    return found


def test_every_number_is_what_the_results_give() -> None:
    assert pages.check(TEXTS) == []


def test_to_write_the_tables_again_changes_nothing() -> None:
    assert {page: pages.generated(text) for page, text in TEXTS.items()} == TEXTS


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json*")), ids=lambda path: path.name)
def test_every_results_file_is_named_on_a_page(path: Path) -> None:
    assert any(path.name in text for text in TEXTS.values())


@pytest.mark.parametrize("page, name", GENERATED)
def test_a_table_with_one_random_number_is_named(page: str, name: str) -> None:
    text, draw = TEXTS[page], random.Random(name)
    table = table_of(text, name)
    for _ in range(20):
        number = draw.choice([*re.finditer(r"\d+\.\d+|\d+", table[0])])
        made_up = f"{float(number[0]) + draw.choice([-1, 1]) * draw.uniform(0.001, 2):.3f}"
        start, end = (table.start() + place for place in number.span())
        (fault,) = pages.faults(page, text[:start] + made_up + text[end:])
        assert page in fault
        assert name in fault


def test_a_table_with_a_row_less_is_named() -> None:
    table = table_of(BENCHMARKS, "race-small")
    shorter = re.sub(r"\| Lion.*\n", "", table[0])
    (fault,) = pages.faults("docs/benchmarks.md", BENCHMARKS.replace(table[0], shorter))
    assert "race-small" in fault


def test_a_value_that_differs_from_its_file_is_named_with_the_right_one() -> None:
    mark = "<!-- value: lm_race.json > results > small > adamw > flops_over_adamw | .2f -->"
    assert list(pages.faults("README.md", f"It is {mark}1.00<!-- /value -->.")) == []
    (fault,) = pages.faults("README.md", f"It is {mark}1.01<!-- /value -->.")
    assert "flops_over_adamw" in fault
    assert "1.00" in fault


def test_a_value_without_a_place_in_its_file_is_named() -> None:
    mark = "<!-- value: lm_race.json > results > tiny > adamw | .2f -->"
    (fault,) = pages.faults("README.md", f"It is {mark}1.00<!-- /value -->.")
    assert "not in the results" in fault


@pytest.mark.parametrize("seed", range(20))
def test_a_stray_number_on_the_benchmarks_page_is_found_wherever_it_stands(seed: int) -> None:
    draw = random.Random(seed)
    number = draw.choice([f"{draw.uniform(0, 3):.3f}", f"{draw.randrange(100)} %", "124,672"])
    place = draw.choice([*re.finditer(r"(?<=[.:])\n\n", BENCHMARKS)]).end()
    stray = f"{BENCHMARKS[:place]}That is {number}.\n\n{BENCHMARKS[place:]}"
    (fault,) = pages.faults("docs/benchmarks.md", stray)
    assert number.split()[0] in fault


@pytest.mark.parametrize(
    "sentence",
    ["needs 4 % fewer steps", "ends 0.026 nats lower", "is 1.5 times faster", "at 1.844"],
)
def test_a_measured_figure_in_a_sentence_of_another_page_needs_its_file(sentence: str) -> None:
    assert len(list(pages.faults("docs/index.md", f"Sophia-G {sentence}."))) == 1


@pytest.mark.parametrize("sentence", ["b1 = 0.9", "k = 10", "`gamma=0.05`", "the 10 steps", "v5e"])
def test_a_setting_in_a_sentence_of_another_page_needs_none(sentence: str) -> None:
    assert list(pages.faults("docs/index.md", f"Sophia-G with {sentence}.")) == []


def test_a_table_on_two_pages_is_named() -> None:
    copied = TEXTS | {"docs/index.md": BENCHMARKS}
    assert any("race-small stands on 2 pages" in fault for fault in pages.check(copied))
