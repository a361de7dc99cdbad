"""Adds the notebooks, as pages, and the plots of the results to the site.

Pages link to files of the repository, so that the links also work where the
repository is browsed. The site has these files at other places, so the links
are rewritten here.
"""

import base64
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
PLOTS = sorted((ROOT / "benchmarks/results").glob("*.png"))

# The notebooks' badge is an image of another site, and this one loads none.
BADGE = re.compile(r"^\[!\[.*?\]\(.*?\)\]\(.*?\)$", re.MULTILINE)

# The code of notebooks is wider than a page beside its table of contents.
WIDE = "---\nhide:\n  - toc\n---"

# Names that a narrow column would split at their hyphen.
CELL = re.compile(r"<t[dh]\b.*?</t[dh]>", re.DOTALL)
NAME = re.compile(r"\b(?:Sophia-[GH]|GPT-2)\b")

# A file of the repository, as a link from any page, and its place on the site.
MOVED = (
    (
        re.compile(r"\]\((?:\.\./)+benchmarks/results/(\w+\.png)\)"),
        "results/{}",
    ),
    (re.compile(r"\]\((?:\.\./)+notebooks/(\w+)\.ipynb\)"), "notebooks/{}.md"),
    (re.compile(r"\]\((?:\.\./)+docs/([\w/-]+\.md(?:#[\w-]+)?)\)"), "{}"),
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the notebooks and the plots."""
    for path in PLOTS:
        files.append(
            File.generated(
                config, f"results/{path.name}", abs_src_path=str(path)
            )
        )
    for path in NOTEBOOKS:
        text, figures = page_of(json.loads(path.read_text()), path.stem)
        files.append(
            File.generated(config, f"notebooks/{path.stem}.md", content=text)
        )
        files.append(
            File.generated(
                config, f"notebooks/{path.name}", abs_src_path=str(path)
            )
        )
        for name, figure in figures.items():
            files.append(
                File.generated(config, f"notebooks/{name}", content=figure)
            )
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Rewrites links to files of the repository."""
    del kwargs
    up = "../" * page.file.src_uri.count("/")
    for pattern, place in MOVED:
        markdown = pattern.sub(
            lambda link, to=place: f"]({up}{to.format(link[1])})", markdown
        )
    return markdown


def on_page_content(content: str, **kwargs: Any) -> str:
    """Keeps names in tables whole, and makes MathML of formulas."""
    del kwargs
    content = CELL.sub(
        lambda cell: NAME.sub(r'<span class="whole">\g<0></span>', cell[0]),
        content,
    )
    content = re.sub(
        r'<span class="arithmatex">\\\((.*?)\\\)</span>',
        lambda formula: mathml(formula[1], "inline"),
        content,
        flags=re.DOTALL,
    )
    return re.sub(
        r'<div class="arithmatex">\\\[(.*?)\\\]</div>',
        lambda formula: mathml(formula[1], "block"),
        content,
        flags=re.DOTALL,
    )


def mathml(formula: str, display: str) -> str:
    """A formula of LaTeX in MathML."""
    latex = (
        html.unescape(formula)
        .replace("{aligned}", "{align*}")
        .replace(r"\tfrac", r"\frac")
    )
    return latex2mathml.converter.convert(latex, display=display)


def page_of(
    notebook: dict[str, Any], name: str
) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its figures by file name."""
    parts, figures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(
                BADGE.sub(f"[Download this notebook]({name}.ipynb).", source)
            )
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            for text, figure in shown(output):
                if figure:
                    file = f"{name}-{len(figures) + 1}.png"
                    figures[file] = figure
                    parts.append(f"![Output of the cell above]({file})")
                else:
                    parts.append(text)
    return "\n\n".join(parts) + "\n", figures


def shown(output: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """An output as Markdown, or as a figure."""
    if output["output_type"] == "stream":
        yield printed("".join(output["text"]).rstrip()), b""
        return
    data = output["data"]
    if "image/png" in data:
        yield "", base64.b64decode(data["image/png"])
    elif "text/html" in data:
        yield f'<div class="output">{"".join(data["text/html"])}</div>', b""
    else:
        yield printed("".join(data["text/plain"])), b""


def printed(text: str) -> str:
    """A block of text that is not wrapped, because it may be a table."""
    return f"``` {{.text .printed}}\n{text}\n```"
