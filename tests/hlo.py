"""Reads what XLA compiled: its text, since the counts that matter here are not in its summaries."""

import collections
import math
import re
from typing import Any

import jax

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (?P<type>.+?) (?P<opcode>[a-z][a-z\-]*)\(")
_ARRAY = re.compile(r"\b(?:pred|bf16|[fsuc]\d+)\[([\d,]*)\]")


def instructions(text: str) -> list[tuple[str, list[int]]]:
    """The instructions of a compiled program.

    Args:
        text: `compiled.as_text()`.

    Returns:
        The opcode of each instruction and the sizes, in elements, of the arrays that it makes.
    """
    found = []
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if match:
            sizes = [
                math.prod(int(n) for n in dims.split(",") if n)
                for dims in _ARRAY.findall(match["type"])
            ]
            found.append((match["opcode"].removesuffix("-start"), sizes))
    return found


def collectives(compiled: Any, more_than: int = 0) -> collections.Counter[str]:
    """How many arrays of more than so many elements each kind of collective moves."""
    counts: collections.Counter[str] = collections.Counter()
    for opcode, sizes in instructions(compiled.as_text()):
        if opcode in COLLECTIVES:
            counts[opcode] += sum(size > more_than for size in sizes)
    return +counts


def copies(compiled: Any, at_least: int) -> int:
    """How many copies there are of arrays with at least so many elements."""
    return sum(
        max(sizes, default=0) >= at_least
        for opcode, sizes in instructions(compiled.as_text())
        if opcode == "copy"
    )


def shapes(tree: Any, sharding: Any = None) -> Any:
    """The abstract values of a tree, in its shardings or in the one given."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree
    )
