"""What a run would cost on a TPU pod that is not there, by compiling its real step for it."""

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from examples.lm import mesh
from examples.lm.config import (
    MODELS,
    MeshConfig,
    TrainConfig,
    UsageError,
    lookup,
)
from examples.lm.optimizers import OPTIMIZERS
from examples.lm.train import Trainer, check

GIB = 2**30

# Memory of a chip, in bytes, and the name that the compiler gives a slice of them.
CHIPS = {
    "v4": (32 * GIB, "v4-{cores}"),
    "v5e": (16 * GIB, "v5litepod-{chips}"),
    "v5p": (95 * GIB, "v5p-{cores}"),
    "v6e": (32 * GIB, "v6e-{chips}"),
}

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class PlanConfig:
    """A run on a pod.

    Attributes:
      model: a name in `config.MODELS`.
      topology: the pod, as "v5e:4x4": the chip, and how many of them lie along each side.
      optimizer: names in `optimizers.OPTIMIZERS`.
      batch_per_chip: sequences that a chip sees in a step.
      accumulate: microbatches that a step is cut into.
      curvature_share: the part of the batch that a curvature estimate sees, as 1 / this.
      update_interval: steps from one estimate to the next.
      remat: recompute activations in the backward pass.
      mesh: the chips' layout; params spread over as many as divide their width if left out.
      json: a file to write the numbers to as well.
    """

    model: str = "gpt2-124m"
    topology: str = "v5e:4x4"
    optimizer: tuple[str, ...] = ("sophia_g",)
    batch_per_chip: int = 16
    accumulate: int = 4
    curvature_share: int = 16
    update_interval: int = 10
    remat: bool = False
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(-1, 0, 1))
    json: str | None = None


def pod(topology: str) -> tuple[list[Any], int]:
    """The chips of a pod, and the memory of each in bytes."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", topology)
    if not match or match[1] not in CHIPS:
        raise UsageError(
            f"There is no topology {topology!r}. Write it like v5e:4x4 or v5p:2x2x4; the chips "
            f"are {', '.join(CHIPS)}."
        )
    memory, accelerator = CHIPS[match[1]]
    chips = math.prod(int(side) for side in match[2].split("x"))
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ["TPU_ACCELERATOR_TYPE"] = accelerator.format(chips=chips, cores=2 * chips)
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{topology} cannot be compiled for: {reason}. It needs libtpu "
            "(pip install 'jax[tpu]') and a slice that exists."
        ) from error
    return list(description.devices), memory


def layout(config: PlanConfig, chips: int) -> MeshConfig:
    """The mesh that was asked for, or params spread as widely as their width divides."""
    if config.mesh.fsdp != 0:
        return config.mesh
    return MeshConfig(data=-1, fsdp=math.gcd(chips, MODELS[config.model].width), tensor=1)


def run_config(config: PlanConfig, optimizer: str, chips: int) -> TrainConfig:
    """The training run that is planned."""
    batch = config.batch_per_chip * chips
    return TrainConfig(
        model=config.model,
        optimizer=optimizer,
        batch_size=batch,
        accumulate=config.accumulate,
        # A chip's part cannot be smaller than one sequence.
        curvature_batch=max(batch // config.curvature_share, chips),
        update_interval=config.update_interval,
        remat=config.remat,
        mesh=layout(config, chips),
    )


def lowered_step(
    config: TrainConfig, device_mesh: Mesh, refresh: bool | None = None, unroll: bool = False
) -> tuple[Trainer, Any]:
    """The run's own training step, traced for the mesh."""
    vocab_size = MODELS[config.model].vocab_size or 256
    trainer = Trainer(config, device_mesh, vocab_size, unroll=unroll)
    state = trainer.abstract_sharded_state()
    shape = config.batch_size, trainer.model.context + 1
    batch = jax.ShapeDtypeStruct(shape, np.int32, sharding=mesh.batch_sharding(device_mesh))
    return trainer, trainer.lower(state, batch, refresh)


def flops(config: TrainConfig, refresh: bool | None = None) -> float:
    """XLA's count for a step over all chips; of a branch it counts the costlier side.

    It counts a loop's body once, so layers and microbatches are laid out flat for it, on one
    device: the sum is the same.
    """
    flat = dataclasses.replace(config, accumulate=1, mesh=MeshConfig(1, 1, 1))
    device_mesh = mesh.make_mesh(flat.mesh, jax.devices("cpu")[:1])
    return lowered_step(flat, device_mesh, refresh, unroll=True)[1].cost_analysis()["flops"]


def shard_bytes(tree: Any) -> int:
    """What one device holds of a tree of shapes."""
    shards = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree))
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shards)


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """How often each kind runs in a step, and the bytes that come out of it.

    A loop's body counts as often as it runs, a branch as if it were taken.
    """
    bodies = re.findall(r"^(?:ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}", hlo, re.MULTILINE | re.DOTALL)
    computations = dict(bodies)
    times = dict.fromkeys(computations, 1)
    for text in computations.values():
        for line in text.splitlines():
            body = re.search(r" while\(.*body=%?([\w.-]+)", line)
            trips = re.search(r"known_trip_count[^\d]*(\d+)", line)
            if body and trips and body[1] in times:
                times[body[1]] = int(trips[1])
    found: dict[str, dict[str, int]] = {}
    for name, text in computations.items():
        for line in text.splitlines():
            match = re.search(rf" = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
            if match:
                row = found.setdefault(match[2], {"count": 0, "bytes": 0})
                row["count"] += times[name]
                row["bytes"] += times[name] * result_bytes(match[1])
    return found


def result_bytes(shapes: str) -> int:
    """Bytes of an instruction's largest result, from its type in the program's text."""
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * (int(bits) if bits else 8) // 8
        for bits, dims in re.findall(r"(?:f|bf|s|u|pred)(\d*)\[([\d,]*)\]", shapes)
    ]
    return max(sizes, default=0)


def cost(config: TrainConfig, device_mesh: Mesh, memory: int) -> dict[str, Any]:
    """One optimizer's numbers, per chip."""
    trainer, lowered = lowered_step(config, device_mesh)
    program = lowered.compile()
    state = trainer.abstract_sharded_state()
    analysis = program.memory_analysis()
    chips = device_mesh.size
    refresh_flops = flops(config) / chips
    if trainer.is_sophia:
        plain_flops = flops(config, refresh=False) / chips
    else:  # what AdamW itself computes is nothing beside a gradient
        plain_flops = flops(dataclasses.replace(config, optimizer="adamw")) / chips
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return {
        "params_bytes": shard_bytes(state.params),
        "state_bytes": shard_bytes(state.opt_state),
        "temp_bytes": analysis.temp_size_in_bytes,
        "peak_bytes": held - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes,
        "hbm_bytes": memory,
        "flops_step": plain_flops,
        "flops_refresh_step": refresh_flops,
        "flops_average": plain_flops + (refresh_flops - plain_flops) / config.update_interval,
        "collectives": collectives(program.as_text()),
    }


def plan(config: PlanConfig) -> None:
    """Compiles the step for each optimizer and prints what a chip would hold and do."""
    lookup(MODELS, config.model, "model")
    for name in config.optimizer:
        lookup(OPTIMIZERS, name, "optimizer")
    for name in ("batch_per_chip", "accumulate", "curvature_share", "update_interval"):
        if getattr(config, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} has to be at least 1.")
    devices, memory = pod(config.topology)
    console = Console()
    device_mesh = mesh.make_mesh(layout(config, len(devices)), devices)
    costs = {}
    for name in config.optimizer:
        run = run_config(config, name, len(devices))
        check(run, device_mesh)
        console.print(f"compiling {config.model} with {name} for {config.topology} ...")
        costs[name] = cost(run, device_mesh, memory)
    console.print(table(config, costs))
    for name, row in costs.items():
        if row["peak_bytes"] > memory:
            console.print(
                f"{name} does not fit: {row['peak_bytes'] / GIB:.2f} GiB of "
                f"{memory / GIB:.0f}. {advice(config, row)}"
            )
    if config.json:
        Path(config.json).write_text(json.dumps(costs, indent=2) + "\n")


def advice(config: PlanConfig, row: dict[str, Any]) -> str:
    """What would make a step fit."""
    standing = row["peak_bytes"] - row["temp_bytes"]
    if standing > row["hbm_bytes"]:
        return "Params and state alone are too large: take more chips, or a larger --mesh.fsdp."
    room = (row["hbm_bytes"] - standing) / row["temp_bytes"]
    batch = int(config.batch_per_chip * room)
    fits = f"--batch-per-chip {batch}, " if batch else ""
    return f"Try {fits}--remat or a higher --accumulate."


def table(config: PlanConfig, costs: dict[str, dict[str, Any]]) -> Table:
    """The numbers side by side."""
    out = Table(title=f"{config.model} on {config.topology}, per chip")
    out.add_column("")
    for name in costs:
        out.add_column(name, justify="right")
    for key in ("params", "state", "temp", "peak", "hbm"):
        sizes = (f"{row[f'{key}_bytes'] / GIB:.3f} GiB" for row in costs.values())
        out.add_row({"temp": "temporaries", "hbm": "memory"}.get(key, key), *sizes)
    out.add_section()
    for key in ("step", "refresh_step", "average"):
        flops = (f"{row[f'flops_{key}'] / 1e12:.3f} TFLOP" for row in costs.values())
        out.add_row(key.replace("_", " "), *flops)
    shares = (f"{100 * (r['flops_average'] / r['flops_step'] - 1):.2f} %" for r in costs.values())
    out.add_row("average overhead", *shares)
    out.add_section()
    for kind in COLLECTIVES:
        rows = [row["collectives"].get(kind, {"count": 0, "bytes": 0}) for row in costs.values()]
        out.add_row(kind, *(f"{r['count']} x, {r['bytes'] / 1e6:.1f} MB" for r in rows))
    return out
