"""Reads the text of a compiled program: which collectives a step runs, how often, with what."""

import collections
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][a-z-]*)\(", re.MULTILINE)
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CALLEES = re.compile(
    r"\b(?:calls|to_apply|body|true_computation|false_computation|branch_computations|"
    r"called_computations)=(?:\{([^}]*)\}|%?([\w.-]+))"
)


def collective_traffic(text: str) -> dict[str, dict[str, int]]:
    """How often each kind of collective runs in a step on a device, and the bytes that it yields.

    A loop's body counts as often as it runs, a branch as if it were taken. An asynchronous
    collective counts once, where it ends; on TPUs it may run during several fusions, each of which
    repeats it, with its channel: it counts where it runs the least, which is where it starts.

    Args:
      text: of a compiled program, `compiled.as_text()`.

    Returns:
      From kind to `count` and `bytes`.
    """
    bodies = computations(text)
    seen: dict[tuple[str, str], tuple[int, int]] = {}
    for computation, times in executions(text).items():
        body = list(instructions(bodies[computation]))
        for name, type_, opcode, line in body:
            kind, result = opcode.removesuffix("-done"), type_
            if kind not in COLLECTIVES:
                continue
            if computation.startswith("all-reduce-scatter"):  # TPUs fuse it with a slice
                kind, result = "reduce-scatter", body[-1][1]
            channel = re.search(r"channel_id=(\d+)", line)
            key = kind, channel[1] if channel else name
            row = times, times * size_in_bytes(result)
            seen[key] = min(row, seen.get(key, row))
    found: dict[str, dict[str, int]] = {}
    for (kind, _), (count, moved) in seen.items():
        row = found.setdefault(kind, {"count": 0, "bytes": 0})
        row["count"] += count
        row["bytes"] += moved
    return found


def executions(text: str) -> collections.Counter[str]:
    """How often each computation of a program runs."""
    bodies = computations(text)
    counts: collections.Counter[str] = collections.Counter()

    def visit(computation: str, times: int) -> None:
        counts[computation] += times
        for _, _, opcode, line in instructions(bodies[computation]):
            trips = trip_count(line, bodies) if opcode == "while" else 1
            for several, one in _CALLEES.findall(line):
                for callee in re.findall(r"[\w.-]+", several or one):
                    visit(callee, times * trips)

    visit(entry(text), 1)
    return counts


def computations(text: str) -> dict[str, str]:
    """The text of each computation by its name."""
    return {name: body for _, name, body in _COMPUTATION.findall(text)}


def entry(text: str) -> str:
    """The computation that a program begins with."""
    return next(name for is_entry, name, _ in _COMPUTATION.findall(text) if is_entry)


def trip_count(line: str, bodies: dict[str, str]) -> int:
    """How often a loop runs: as the compiler notes it, or from its counter's bound and step.

    Where it is neither, as in a loop that ends on a condition of the data, it counts once.
    """
    noted = re.search(r"known_trip_count\D*(\d+)", line)
    if noted:
        return int(noted[1])
    try:
        return _counted(line, bodies)
    except (AttributeError, LookupError, StopIteration, TypeError):
        return 1


def _counted(line: str, bodies: dict[str, str]) -> int:
    """The rounds of a loop whose counter goes from 0 to a bound.

    Its steps are larger than 1 where XLA has unrolled the loop.
    """
    condition, body = (
        {name: text for name, _, _, text in instructions(bodies[called])}
        for called in re.search(r"condition=%?([\w.-]+), body=%?([\w.-]+)", line).groups()
    )
    compared = re.search(r"compare\((.*?)\), direction=LT", "\n".join(condition.values()))
    counter, bound = operands(compared[0], "compare")
    index = re.search(r"index=(\d+)", condition[counter])
    results = next(text for text in body.values() if text.lstrip().startswith("ROOT"))
    counted = body[operands(results, "tuple")[int(index[1])]]
    step = [constant(body[name]) for name in operands(counted, "add")]
    return -(-constant(condition[bound]) // (max(step, default=0) or 1))


def operands(line: str, opcode: str) -> list[str]:
    """The names that an instruction is applied to."""
    arguments = re.search(rf"\b{opcode}\(([^()]*)\)", line)
    return re.findall(r"%([\w.-]+)", arguments[1]) if arguments else []


def constant(line: str) -> int:
    """The number that an instruction stands for, 0 if it is not a constant."""
    number = re.search(r" constant\((\d+)\)", line)
    return int(number[1]) if number else 0


def instructions(body: str) -> Iterator[tuple[str, str, str, str]]:
    """The name, type, opcode and whole line of each instruction in a computation."""
    for line in body.splitlines():
        match = _INSTRUCTION.match(line)
        if match:
            yield match[1], match[2], match[3], line


def arrays(type_: str) -> list[tuple[int, int]]:
    """How many elements each array of a type has, and the bits of one of them."""
    return [
        (math.prod(int(n) for n in dims.split(",") if n), int(bits or 8))
        for bits, dims in _ARRAY.findall(type_)
    ]


def size_in_bytes(type_: str) -> int:
    """Bytes of a type, all the arrays of a tuple together."""
    return sum(elements * bits // 8 for elements, bits in arrays(type_))
