"""Counts in what XLA compiled, read with the parser of `examples.lm.hlo`."""

import collections
import re
from typing import Any

from benchmarks.lib.programs import donated_update as donated_step
from examples.lm import hlo

__all__ = [
    "COLLECTIVES",
    "collectives",
    "copies",
    "distinct_computations",
    "donated_step",
    "entry_passes",
    "instructions",
]

# In the entry computation these touch no memory, or are counted elsewhere.
NO_PASS = ("parameter", "tuple", "get-tuple-element", "bitcast", "conditional")
COLLECTIVES = (*hlo.COLLECTIVES, "collective-broadcast")


def instructions(text: str, dtype: str = "") -> list[tuple[str, list[int]]]:
    """The instructions of a compiled program.

    Args:
        text: `compiled.as_text()`.
        dtype: what the type of the result must begin with.

    Returns:
        The opcode of each instruction and the sizes, in elements, of the arrays that it makes.
    """
    return [
        (opcode.removesuffix("-start"), sizes(type_))
        for _, type_, opcode, _ in hlo.instructions(text)
        if type_.startswith(dtype)
    ]


def sizes(type_: str) -> list[int]:
    """The elements of each array of a type."""
    return [elements for elements, _ in hlo.arrays(type_)]


def collectives(compiled: Any, more_than: int = 0) -> collections.Counter[str]:
    """How many arrays of more than so many elements each kind of collective moves."""
    counts: collections.Counter[str] = collections.Counter()
    for opcode, elements in instructions(compiled.as_text()):
        if opcode in COLLECTIVES:
            counts[opcode] += sum(size > more_than for size in elements)
    return +counts


def distinct_computations(compiled: Any) -> int:
    """How many computations of a program differ by more than names; XLA for CPU compiles each once.

    Args:
        compiled: a compiled function.

    Returns:
        Their number, the entry computation included.
    """
    text = re.sub(r", metadata=\{[^}]*\}", "", compiled.as_text())

    def renamed(body: str) -> str:
        names: dict[str, str] = {}
        return re.sub(r"%[\w.-]+", lambda name: names.setdefault(name[0], f"%{len(names)}"), body)

    return len({renamed(body) for body in hlo.computations(text).values()})


def copies(compiled: Any, at_least: int) -> int:
    """How many copies there are of float32 arrays with at least so many elements.

    (The random number generator of jax copies unsigned integers on CPUs, in a loop of its own.)
    """
    return sum(
        max(elements, default=0) >= at_least
        for opcode, elements in instructions(compiled.as_text(), "f32")
        if opcode == "copy"
    )


def entry_passes(compiled: Any, size: int) -> int:
    """How many arrays of a size the entry computation reads and writes, its branches left out.

    Args:
        compiled: a compiled function.
        size: of the arrays that count, in elements.

    Returns:
        The sum, over the instructions that touch memory, of operands and results of that size.
    """
    text = compiled.as_text()
    passes, made = 0, {}
    for name, type_, opcode, line in hlo.instructions(hlo.computations(text)[hlo.entry(text)]):
        made[name] = sizes(type_).count(size)
        if opcode not in NO_PASS:
            operands = hlo.operands(line, opcode)
            passes += made[name] + sum(made.get(operand, 0) for operand in operands)
    return passes
