"""The list of differences from the paper, which the optimizer's module begins with."""

import ast
import re

from benchmarks.tables.formats import ROOT, table


@table
def differences() -> str:
    """The differences from the paper and from other code."""
    module = ast.parse((ROOT / "sophia_optax/_scale_by_sophia.py").read_text())
    text = ast.get_docstring(module) or ""
    listed = text[text.index("Differences from ") :]
    return re.sub(r"^Differences from (.+):$", r"## What differs from \1", listed, flags=re.M)
