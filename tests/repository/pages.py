"""Pages of Markdown: their blocks of code, run one after another as a reader would."""

import ast
import contextlib
import importlib.util
import io
import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = sorted(ROOT.glob("docs/**/*.md"))

# A fence may be indented, under a list or a tab.
_FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block, and what stands between it and the one before."""

    language: str
    code: str
    line: int
    between: str


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    text, found, end = page.read_text(), [], 0
    for match in _FENCE.finditer(text):
        _, language, code = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(language, textwrap.dedent(code), line, text[end : match.start()]))
        end = match.end()
    return found


def code_blocks(page: Path, language: str) -> list[str]:
    """The blocks in one language."""
    return [block.code for block in blocks(page) if block.language == language]


def sides(diff: str) -> tuple[str, str]:
    """The code before and after a block of `diff`."""
    before, after = (
        "\n".join(line[1:] for line in diff.splitlines() if not line.startswith(sign))
        for sign in "+-"
    )
    return before, after


def missing(code: str) -> set[str]:
    """The modules that a block imports and that are not installed."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in {name.split(".")[0] for name in found} if not _is_installed(name)}


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def run(page: Path) -> set[str]:
    """Runs the Python of a page in one namespace.

    A block of text right after one of Python is what that prints, up to line breaks. In the README,
    every block ends with a loss that has fallen.

    Args:
      page: the file.

    Returns:
      The modules that are not installed, for which blocks were left out.
    """
    namespace: dict[str, Any] = {"__name__": page.stem}
    absent: set[str] = set()
    printed: str | None = None
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if block.language == "text" and printed is not None and not block.between.strip():
            assert printed.split() == block.code.split(), f"{where} says otherwise: {printed}"
        printed = None
        if block.language != "python":
            continue
        if missing(block.code):
            absent |= missing(block.code)
            continue
        out = io.StringIO()
        source = "\n" * block.line + block.code  # so that a traceback has the page's lines
        with contextlib.redirect_stdout(out):
            exec(compile(source, str(page), "exec"), namespace)
        printed = out.getvalue()
        if page == README:
            assert namespace.pop("loss") < 0.6, "the quickstarts start at log 3 and learn"
    return absent
