"""What a compiled program does to memory, and what its matrix products cost."""

import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from examples.lm import hlo

# These move nothing: they name parts of what is there, or start and end what is counted elsewhere.
FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "copy-done", "slice-done", "partition-id", "after-all", "iota",
)  # fmt: skip
ARRAY = re.compile(r"[a-z]+\d*\[[\d,]*\](?:\{[^{}]*\})?")
ON_CHIP = re.compile(r"S\([1-9]\d*\)")


def donated_update(tx: Any, params: Any, sharding: Any = None, **arguments: Any) -> Any:
    """Compiles an optimizer's update and `apply_updates`, with params and state donated.

    Args:
      tx: the optimizer.
      params: their shapes.
      sharding: of the params and of the state that is like them; fewer axes are replicated.
      **arguments: for `update`; a function stands for what it makes of the params.

    Returns:
      The compiled function of (params, state, gradients).
    """

    def update(params: Any, state: Any, grads: Any) -> Any:
        extra = {name: x(params) if callable(x) else x for name, x in arguments.items()}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    def place(x: Any) -> Any:
        own = sharding
        if isinstance(own, NamedSharding) and len(x.shape) < len(own.spec):
            own = NamedSharding(own.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own)

    state = jax.tree.map(place, jax.eval_shape(tx.init, params))
    params = jax.tree.map(place, params)
    return jax.jit(update, donate_argnums=(0, 1)).lower(params, state, params).compile()


def running(text: str) -> Iterator[tuple[int, list[tuple[str, str, str, str]]]]:
    """The computations that run off a refresh, and how often: of a branch, the first alternative.

    `lax.cond` lowers to a branch whose first alternative is the one for False. What runs inside of
    a fusion touches no memory.
    """
    bodies = hlo.computations(text)
    waiting = [(hlo.entry(text), 1)]
    while waiting:
        name, times = waiting.pop()
        body = list(hlo.instructions(bodies[name]))
        yield times, body
        for _, _, opcode, line in body:
            if opcode == "while":
                called = re.search(r"body=%?([\w.-]+)", line)
                waiting.append((called[1], times * hlo.trip_count(line, bodies)))
            elif opcode == "conditional":
                called = re.search(
                    r"(?:branch_computations=\{|false_computation=)%?([\w.-]+)", line
                )
                waiting.append((called[1], times))


def main_memory_bytes(text: str) -> int:
    """Bytes that a program reads from and writes to main memory off a refresh.

    The operands and results of all that runs, loops as often as they do. A TPU's compiler copies
    some arrays to memory on the chip ahead of their use. Only the access to main memory of such a
    copy counts, while XLA's own "bytes accessed" has all three accesses.
    """
    total = 0
    for times, body in running(text):
        held: dict[str, int] = {}
        for name, type_, opcode, line in body:
            arrays = ARRAY.findall(type_)
            if opcode in ("copy-start", "slice-start"):  # (from, to, ...) or (to, from, ...)
                sides = sum(not ON_CHIP.search(array) for array in arrays[:2])
                total += times * sides * min(map(hlo.size_in_bytes, arrays[:2]))
                continue
            in_main_memory = [array for array in arrays if not ON_CHIP.search(array)]
            held[name] = sum(map(hlo.size_in_bytes, in_main_memory))
            if opcode not in FREE:
                read = set(hlo.operands(line, opcode))
                total += times * (held[name] + sum(held.get(operand, 0) for operand in read))
    return total


def copies(text: str, at_least: int) -> int:
    """How many copies of float32 arrays with at least so many bytes run off a refresh."""
    return sum(
        times
        for times, body in running(text)
        for _, type_, opcode, _ in body
        if opcode == "copy" and type_.startswith("f32") and hlo.size_in_bytes(type_) >= at_least
    )


def product_flops(jaxpr: Any) -> int:
    """FLOPs of the matrix products of a traced function, loops as often as they run."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = [x for value in eqn.params.values() for x in jax.tree.leaves(value, is_leaf=_code)]
        of_parts = [product_flops(getattr(x, "jaxpr", x)) for x in inner if _code(x)]
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * eqn.outvars[0].aval.size
        elif eqn.primitive.name == "scan":
            total += eqn.params["length"] * sum(of_parts)
        elif eqn.primitive.name == "cond":
            total += max(of_parts)
        else:
            total += sum(of_parts)
    return total


def _code(x: Any) -> bool:
    """Whether this is a jaxpr."""
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def flops_with_bases_in_each_step(row: dict[str, float], interval: int) -> float:
    """The average step's, if it refreshed the eigenbases each time.

    Args:
      row: what `examples.lm.plan.step_flops` returned.
      interval: steps from one estimate of the curvature to the next.
    """
    return row["flops_basis_step"] + (row["flops_refresh_step"] - row["flops_step"]) / interval
