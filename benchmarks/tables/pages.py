"""The marks of pages: what they name is written between them, and checked.

A page holds a generated table between two comments, and a figure of a sentence between two more:

    <!-- table: race-small -->
    <!-- /table -->

    It had <!-- value: lm_race.json > results > small > lion > tries | d -->16<!-- /value --> tries.

The name of a table is a function of one of the modules beside this one, with dashes. A value is a
path into a file, then a format: one of Python's, or one of `FORMATS`. On the pages of `STRICT` no
digit stands outside of these marks, code and links; on the others, none with a unit of `MEASURED`
or with three decimals.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.tables import (  # noqa: F401  each registers its tables
    ablations,
    batch_sizes,
    defaults,
    differences,
    digits,
    estimator_quality,
    lm_compare,
    lm_race,
    orthonormalize,
    pod_cost,
    rare_rows,
    self_tuning_gamma,
    step_cost,
    warmup,
)
from benchmarks.tables.formats import FORMATS, ROOT, TABLES, read

STRICT = ("docs/benchmarks.md", "benchmarks/README.md")
HOW = "benchmarks/tables/pages.py"
MEASURED = r"percent|nats|times|passes|wrong|fewer|more"

_TABLE = re.compile(r"^(<!-- table: ([\w.-]+) -->\n)(.*?)^(<!-- /table -->)$", re.M | re.S)
_VALUE = re.compile(r"(<!-- value: ([^|]+?) \| ([^|]+?) -->)(.*?)(<!-- /value -->)", re.S)

# What may hold digits on a strict page.
_EXEMPT = re.compile(
    r"""^\ *```.*?^\ *```$            # blocks of code
    | `[^`\n]*[A-Za-z][^`\n]*`       # code with a letter in it
    | \[\d{4}\.\d{5}\]\([^)]*\)     # links to arXiv
    | \]\([^)\s]*\)                 # addresses of other links
    | <!--.*?--> | </?[a-z][^>]*>    # comments and tags
    """,
    re.M | re.S | re.X,
)
_NUMBER = re.compile(r"(?<![\w.])(?<!\w-)\d[\d,.]*")
_FIGURE = re.compile(rf"(?<![\w.])(?:\d[\d,.]*\s?(?:%|(?:{MEASURED})\b)|(?!0\.965)\d+\.\d{{3,}})")


def pages() -> list[Path]:
    """The READMEs and the site's pages."""
    readmes = ("README.md", "benchmarks/README.md", "examples/lm/README.md", "notebooks/README.md")
    return [*(ROOT / name for name in readmes), *sorted((ROOT / "docs").rglob("*.md"))]


def value(path: str, form: str) -> str:
    """What a path into a results file holds, in a format."""
    name, *keys = path.split(" > ")
    try:
        found = read(name)
        for key in keys:
            found = found[int(key)] if isinstance(found, list) else found[key]
    except (OSError, LookupError, ValueError):
        return "not in the results"
    return FORMATS[form](found) if form in FORMATS else format(found, form)


def rendered(name: str) -> str:
    """A table by its name."""
    try:
        return TABLES[name]()
    except (OSError, LookupError, ValueError) as error:
        return f"{error!r} instead of a table"


def generated(text: str) -> str:
    """A page with its tables and values made anew."""
    text = _TABLE.sub(lambda mark: f"{mark[1]}\n{rendered(mark[2])}\n\n{mark[4]}", text)
    return _VALUE.sub(lambda mark: mark[1] + value(mark[2], mark[3]) + mark[5], text)


def faults(page: str, text: str) -> Iterator[str]:
    """What is wrong with a page's numbers, a sentence each.

    Args:
      page: its path from the root of the repository.
      text: what it holds.

    Yields:
      The file and the table, value or number.
    """
    for mark in _TABLE.finditer(text):
        if mark[3].strip() != rendered(mark[2]):
            yield f"{page}: table {mark[2]} is not what the results give"
    for mark in _VALUE.finditer(text):
        if mark[4] != (right := value(mark[2], mark[3])):
            yield f"{page}: value {mark[2]} is {right}, not {mark[4]}"
    if re.search(r"^\s*<!-- /?value", text, re.MULTILINE):
        yield f"{page}: a value begins a line, which Markdown takes for a block"
    prose = _EXEMPT.sub(" ", _VALUE.sub(" ", _TABLE.sub(" ", text)))
    pattern = _NUMBER if page in STRICT else _FIGURE
    for found in pattern.finditer(prose):
        line = prose[prose.rfind("\n", 0, found.start()) + 1 : prose.find("\n", found.end())]
        yield f"{page}: {found[0]!r} is quoted without its file; see {HOW}: {line.strip()}"


def places(texts: dict[str, str]) -> dict[str, list[str]]:
    """On which pages each table stands."""
    found: dict[str, list[str]] = {name: [] for name in TABLES}
    for page, text in texts.items():
        for mark in _TABLE.finditer(text):
            found.setdefault(mark[2], []).append(page)
    return found


def check(texts: dict[str, str]) -> list[str]:
    """All faults of the pages, by their paths from the root of the repository."""
    found = [fault for page, text in texts.items() for fault in faults(page, text)]
    for name, where in places(texts).items():
        if len(where) != 1:
            found.append(f"table {name} stands on {len(where)} pages, not on one: {where}")
    return found
