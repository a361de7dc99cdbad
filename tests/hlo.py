"""Reads what XLA compiled: its text, since the counts that matter here are not in its summaries."""

import collections
import math
import re
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

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


def instructions(text: str, dtype: str = "") -> list[tuple[str, list[int]]]:
    """The instructions of a compiled program.

    Args:
        text: `compiled.as_text()`.
        dtype: what the type of the result must begin with.

    Returns:
        The opcode of each instruction and the sizes, in elements, of the arrays that it makes.
    """
    found = []
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if match and match["type"].startswith(dtype):
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
    """How many copies there are of float32 arrays with at least so many elements.

    (The random number generator of jax copies unsigned integers on CPUs, in a loop of its own.)
    """
    return sum(
        max(sizes, default=0) >= at_least
        for opcode, sizes in instructions(compiled.as_text(), "f32")
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
    lines = compiled.as_text().split("\nENTRY ", 1)[1].splitlines()[1:]
    passes, made = 0, {}
    for line in lines:
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        name = line.split(" = ")[0].removeprefix("ROOT").strip().removeprefix("ROOT ").lstrip("%")
        dims = _ARRAY.findall(match["type"])
        made[name] = sum(math.prod(int(n) for n in d.split(",") if n) == size for d in dims)
        if match["opcode"] in ("parameter", "tuple", "get-tuple-element", "bitcast", "conditional"):
            continue
        operands = re.findall(r"%([\w.\-]+)", line[match.end() :].split("), ")[0])
        passes += made[name] + sum(made.get(operand, 0) for operand in operands)
    return passes


def donated_step(tx: Any, params: Any, sharding: Any = None, **arguments: Any) -> Any:
    """Compiles a step of an optimizer, `apply_updates` included, with params and state donated.

    Args:
        tx: the optimizer.
        params: their shapes.
        sharding: of the params and of the state that is like them; fewer axes are replicated.
        **arguments: for `update`; a function stands for what it makes of the params.

    Returns:
        The compiled step.
    """

    def step(params: Any, state: Any, grads: Any) -> Any:
        extra = {name: x(params) if callable(x) else x for name, x in arguments.items()}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    def place(x: Any) -> Any:
        spec = sharding
        if isinstance(sharding, NamedSharding) and len(x.shape) < len(sharding.spec):
            spec = NamedSharding(sharding.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec)

    state = jax.tree.map(place, jax.eval_shape(tx.init, params))
    params = jax.tree.map(place, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
