"""What a run would cost on a TPU pod that is not there, by compiling its real step for it."""

import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

import sophia_optax

from . import hlo, mesh, run_folder
from .config import MODELS, MeshConfig, TrainConfig, UsageError, lookup
from .memory import GIB, shard_bytes
from .optimizers import OPTIMIZERS, check_used
from .run import Run, resolve
from .train import Trainer, states_of


@dataclass(frozen=True)
class Chip:
    """A kind of TPU.

    Attributes:
      memory: of a chip, in bytes.
      accelerator: the name that the compiler gives a slice of them.
      sides: the largest slice there is.
    """

    memory: int
    accelerator: str
    sides: tuple[int, ...]


CHIPS = {
    "v4": Chip(32 * GIB, "v4-{cores}", (16, 16, 16)),
    "v5e": Chip(16 * GIB, "v5litepod-{chips}", (16, 16)),
    "v5p": Chip(95 * GIB, "v5p-{cores}", (16, 20, 28)),
    "v6e": Chip(32 * GIB, "v6e-{chips}", (16, 16)),
}

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


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
      remat: recompute activations in the backward pass; if left out, for models wider than
        gpt2-124m, whose activations do not fit otherwise.
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
    remat: bool | None = None
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(-1, 0, 1))
    json: str | None = None


def pod(topology: str) -> tuple[list[Any], int]:
    """The chips of a pod, and the memory of each in bytes."""
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*){1,2})", topology)
    if not match or match[1] not in CHIPS:
        raise UsageError(
            f"There is no topology {topology!r}. Write it like v5e:4x4 or v5p:2x2x4; the chips "
            f"are {', '.join(CHIPS)}."
        )
    chip = CHIPS[match[1]]
    sides = sorted(int(side) for side in match[2].split("x"))
    # Beyond these the compiler ends the process.
    if len(sides) > len(chip.sides) or any(a > b for a, b in zip(sides, chip.sides, strict=False)):
        largest = "x".join(map(str, chip.sides))
        raise UsageError(f"{topology} is too large: the largest slice is {match[1]}:{largest}.")
    if not importlib.util.find_spec("libtpu"):
        raise UsageError("A plan needs the TPU compiler, libtpu: pip install 'jax[tpu]'.")
    chips = math.prod(sides)
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ["TPU_ACCELERATOR_TYPE"] = chip.accelerator.format(chips=chips, cores=2 * chips)
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{topology} cannot be compiled for ({reason}). Choose a slice that exists, such as "
            f"{match[1]}:{'x'.join('4' for _ in chip.sides)}."
        ) from error
    return list(description.devices), chip.memory


def layout(config: PlanConfig, chips: int) -> MeshConfig:
    """The mesh that was asked for, or params spread as widely as their width divides."""
    if config.mesh.fsdp != 0:
        return config.mesh
    return MeshConfig(data=-1, fsdp=math.gcd(chips, MODELS[config.model].width), tensor=1)


def run_config(config: PlanConfig, optimizer: str, chips: int) -> TrainConfig:
    """The training run that is planned."""
    batch = config.batch_per_chip * chips
    widest_kept = MODELS["gpt2-124m"].width
    remat = MODELS[config.model].width > widest_kept if config.remat is None else config.remat
    return TrainConfig(
        model=config.model,
        optimizer=optimizer,
        batch_size=batch,
        accumulate=config.accumulate,
        # A chip's part cannot be smaller than one sequence.
        curvature_batch=max(batch // config.curvature_share, chips),
        update_interval=config.update_interval,
        remat=remat,
        mesh=layout(config, chips),
    )


def trainer_of(run: Run, unroll: bool | None = None) -> Trainer:
    """The run's trainer, with a vocabulary of bytes where the model does not name one."""
    return Trainer(run.with_vocabulary(run.model.vocab_size or 256), unroll=unroll)


def lowered_step(
    run: Run,
    refresh: bool | None = None,
    refresh_basis: bool | None = None,
    unroll: bool | None = None,
) -> tuple[Trainer, Any]:
    """The run's own training step, traced for its mesh."""
    trainer = trainer_of(run, unroll)
    return trainer, traced(trainer, refresh, refresh_basis)


def traced(trainer: Trainer, refresh: bool | None = None, refresh_basis: bool | None = None) -> Any:
    """A trainer's step before compilation."""
    run = trainer.run
    shape = run.config.batch_size, run.model.context + 1
    batch = jax.ShapeDtypeStruct(shape, np.int32, sharding=mesh.batch_sharding(run.mesh))
    return trainer.lower(trainer.abstract_sharded_state(), batch, refresh, refresh_basis)


@functools.cache
def flops(run: Run, refresh: bool | None = None, refresh_basis: bool | None = None) -> float:
    """XLA's count for a step over all chips; of a branch it counts the costlier side.

    It counts a loop's body once, so layers and microbatches are laid out flat for it, on one
    device: the sum is the same.
    """
    flat = dataclasses.replace(
        run,
        config=dataclasses.replace(run.config, accumulate=1),
        mesh=mesh.make_mesh(MeshConfig(1, 1, 1), jax.devices("cpu")[:1]),
    )
    lowered = lowered_step(flat, refresh, refresh_basis, unroll=True)[1]
    return lowered.cost_analysis()["flops"]


def bases_of(run: Run) -> list[Any]:
    """The eigenbases in a run's state, as shapes `[..., n, n]`."""
    states = states_of(sophia_optax.InEigenbasisState, trainer_of(run).abstract_state.opt_state)
    bases = [basis for state in states for basis in state.bases if hasattr(basis, "left_basis")]
    sides = [side for basis in bases for side in (basis.left_basis, basis.right_basis)]
    return [side for side in sides if side is not None]


def qr_flops(bases: list[Any]) -> float:
    """Those of Householder's QR with its Q, of which XLA counts a loop's body or nothing at all."""
    return sum(8 / 3 * math.prod(basis.shape) * basis.shape[-1] for basis in bases)


def step_flops(run: Run) -> dict[str, float]:
    """Those of a step over all chips.

    Returns:
      `flops_step` of a step that refreshes nothing; `flops_refresh_step` of one that estimates the
      curvature; `flops_basis_step` of one that refreshes eigenbases, of which QR's are the
      textbook's; and `flops_average`.
    """
    bases = bases_of(run)
    fixed = {"refresh_basis": False} if bases else {}
    plain = refresh = flops(run, **fixed)
    if run.optimizer.curvature and trainer_of(run).is_sophia:
        plain = flops(run, refresh=False, **fixed)
    elif run.optimizer.curvature:  # what AdamW itself computes is nothing compared with a gradient
        plain = flops(dataclasses.replace(run, optimizer=OPTIMIZERS["adamw"]))
    h = run.hyperparameters
    basis, average = plain, plain + (refresh - plain) / h.update_interval
    if bases:
        off = False if run.optimizer.curvature else None
        basis = flops(run, refresh=off, refresh_basis=True) + qr_flops(bases)
        average += (basis - plain) / (h.basis_interval or 1)
    return {
        "flops_step": plain,
        "flops_refresh_step": refresh,
        "flops_basis_step": basis,
        "flops_average": average,
    }


def compile_or_need(lowered: Any) -> tuple[Any, int]:
    """The compiled program, or None and the temporaries that it would need, in bytes."""
    try:
        return lowered.compile(), 0
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGT]?)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not needed:
            raise
        return None, int(float(needed[1]) * UNITS[needed[2]])


def peak_bytes(program: Any) -> int:
    """The most that a compiled program holds on a device."""
    analysis = program.memory_analysis()
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return held - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes


def cost(run: Run, memory: int) -> dict[str, Any]:
    """One optimizer's numbers, per chip. Those of a program that does not fit are its needs."""
    trainer, lowered = lowered_step(run)
    start = time.process_time()
    program, temporaries = compile_or_need(lowered)
    compile_seconds = time.process_time() - start
    state = trainer.abstract_sharded_state()
    params, opt_state = shard_bytes(state.params), shard_bytes(state.opt_state)
    peak = params + opt_state + temporaries
    if program:
        temporaries = program.memory_analysis().temp_size_in_bytes
        peak = peak_bytes(program)
    return {
        "params_bytes": params,
        "state_bytes": opt_state,
        "temp_bytes": temporaries,
        "peak_bytes": peak,
        "hbm_bytes": memory,
        **{name: count / run.mesh.size for name, count in step_flops(run).items()},
        "collectives": hlo.collective_traffic(program.as_text()) if program else {},
        "compile_seconds": round(compile_seconds, 1),
    }


def plan(config: PlanConfig) -> None:
    """Compiles the step for each optimizer and prints what a chip would hold and do."""
    lookup(MODELS, config.model, "model")
    check_used(config, config.optimizer)
    check_file(config.json)
    jax.config.update("jax_platforms", "cpu")  # nothing here runs on an accelerator
    devices, memory = pod(config.topology)
    console = Console(markup=False, emoji=False)
    runs = {
        name: resolve(run_config(config, name, len(devices)), devices=devices)
        for name in config.optimizer
    }
    costs = {}
    for name, run in runs.items():
        console.print(f"compiling {config.model} with {name} for {config.topology} ...")
        costs[name] = cost(run, memory)
    console.print(table(runs, costs, config))
    if config.json:
        run_folder.write_json(Path(config.json), costs)
    too_large = {name: row for name, row in costs.items() if row["peak_bytes"] > memory}
    if too_large:
        raise UsageError(
            "\n".join(
                f"{config.model} with {name} does not fit on {config.topology}: it needs "
                f"{row['peak_bytes'] / GIB:.2f} GiB of {memory / GIB:.0f} a chip. "
                + advice(runs[name], row)
                for name, row in too_large.items()
            )
        )


def check_file(path: str | None) -> None:
    """Tells the user, before minutes of compilation, of a file that cannot be written."""
    if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise UsageError(
            f"--json {path} is not a file in a folder that exists. Make the folder, or name "
            "another file."
        )


def takes_whole_batch(run: Run) -> bool:
    """Whether its curvature is that of the whole batch."""
    curvature = run.optimizer.curvature
    return curvature is not None and curvature.whole_batch


def advice(run: Run, row: dict[str, Any]) -> str:
    """What would make a step fit."""
    standing = row["peak_bytes"] - row["temp_bytes"]
    room = row["hbm_bytes"] - standing
    if room <= 0:
        return "Params and state alone are too large: take more chips, or a larger --mesh.fsdp."
    batch = run.config.batch_size // run.mesh.size
    whole_batch = takes_whole_batch(run)
    together = batch if whole_batch else batch // run.config.accumulate
    fits = int(together * 0.9 * room / row["temp_bytes"])  # some of it does not shrink
    remat = "" if run.config.remat else " or --remat True"
    if not fits:
        return f"A single sequence a chip is too much: try a larger --mesh.tensor{remat}."
    if whole_batch:
        return f"It differentiates all at once: try --batch-per-chip {fits} --accumulate 1{remat}."
    accumulate = next(n for n in range(-(-batch // fits), batch + 1) if batch % n == 0)
    return f"Try --accumulate {accumulate}{remat}."


def table(runs: dict[str, Run], costs: dict[str, dict[str, Any]], config: PlanConfig) -> Table:
    """The numbers side by side."""
    run = next(iter(runs.values())).config
    whole = [name for name in runs if takes_whole_batch(runs[name])]
    curvature = (
        f"; curvature on {run.curvature_batch} of {run.batch_size} sequences"
        f"{''.join(f' ({name}: on all)' for name in whole)}, every {config.update_interval} steps; "
        "collectives with a refresh"
    )
    out = Table(
        title=f"{config.model} on {config.topology}, per chip",
        caption=(
            f"{config.batch_per_chip} sequences a chip in {config.accumulate} microbatches"
            f"{', activations recomputed' if run.remat else ''}"
            f"{curvature if any(r.optimizer.curvature for r in runs.values()) else ''}"
        ),
    )
    out.add_column("")
    for name in costs:
        out.add_column(name, justify="right")
    for key in ("params", "state", "temp", "peak", "hbm"):
        sizes = (f"{row[f'{key}_bytes'] / GIB:.3f} GiB" for row in costs.values())
        out.add_row({"temp": "temporaries", "hbm": "memory"}.get(key, key), *sizes)
    out.add_section()
    for key in ("step", "refresh_step", "basis_step", "average"):
        flops = (f"{row[f'flops_{key}'] / 1e12:.3f} TFLOP" for row in costs.values())
        out.add_row(key.replace("_", " "), *flops)
    shares = (f"{100 * (r['flops_average'] / r['flops_step'] - 1):.2f} %" for r in costs.values())
    out.add_row("average overhead", *shares)
    out.add_section()
    for kind in hlo.COLLECTIVES:
        cells = []
        for row in costs.values():
            moved = row["collectives"].get(kind, {"count": 0, "bytes": 0})
            known = row["peak_bytes"] <= row["hbm_bytes"]
            cells.append(f"{moved['count']} x, {moved['bytes'] / 1e6:.1f} MB" if known else "?")
        out.add_row(kind, *cells)
    out.add_section()
    out.add_row("compilation, CPU", *(f"{row['compile_seconds']:.0f} s" for row in costs.values()))
    return out
