"""What a step costs: AdamW, Lion, Muon, optax.contrib.sophia, Sophia-H and Sophia-G, 1M to 1.5B.

    python -m benchmarks.step_cost            # what is not in the results yet
    python -m benchmarks.step_cost --quick    # under two minutes; writes to runs/

What does not vary is read from compiled programs: memory traffic, temporaries and copies of the
update alone, on this machine's CPU and, with the extra `tpu`, on a TPU that is not there; FLOPs and
memory of the whole train step of `examples.lm`. What does vary is timed on the default device,
every optimizer once a round, and given as the median over the rounds of its ratio to AdamW's.
"""

import dataclasses
import functools
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from flax import nnx
from jax.sharding import SingleDeviceSharding

from benchmarks.lib import programs, timing
from benchmarks.lib.provenance import RESULTS, provenance
from examples.lm import data, mesh, plan
from examples.lm.config import MODELS, MeshConfig, ModelConfig, TrainConfig
from examples.lm.model import Transformer, parameter_count
from examples.lm.optimizers import OPTIMIZERS, Curvature, hutchinson
from examples.lm.run import Run, resolve
from examples.lm.train import Trainer

Row = dict[str, Any]

SIZES = {
    "1m": ModelConfig(layers=4, width=128, heads=4, context=128, vocab_size=1024),
    "11m": ModelConfig(layers=6, width=384, heads=6, context=128, vocab_size=1024),
    **{name: MODELS[name] for name in ("gpt2-124m", "gpt2-1.5b")},
}
WIDTHS = {
    f"width-{width}": ModelConfig(layers=2, width=width, heads=4, context=128, vocab_size=1024)
    for width in (64, 128, 256, 512)
}
NAMES = ("adamw", "lion", "muon", "contrib_sophia", "sophia_h", "sophia_g")
TURNED = ("soap", "sophia_g_eigenbasis")
SOPHIAS = ("contrib_sophia", "sophia_h", "sophia_g")
TPU = "v5p:2x2x1"  # a chip of it holds params, two moments and gradients of 1.5B params
BATCH, SHARE, INTERVAL = 16, 16, 10
GROWTH = (1, 2, 5, 10, 20, 50)  # values of k


@dataclasses.dataclass(frozen=True)
class Scope:
    """How much is measured.

    Attributes:
      names: the optimizers; AdamW is among them.
      compiled: sizes whose update is compiled.
      counted: sizes whose train step's FLOPs are counted.
      stepped: sizes whose train step is compiled.
      timed_updates: sizes whose update is timed.
      timed_steps: sizes whose train step is timed.
      timed_widths: names in `WIDTHS` whose train step is timed in the eigenbasis too.
      growth: the size at which probes, batch share and interval vary.
      shares: parts of the batch that an estimate sees, as 1 / these.
      probes: of Sophia-H.
      rounds: of the timings.
    """

    names: tuple[str, ...] = NAMES
    compiled: tuple[str, ...] = tuple(SIZES)
    counted: tuple[str, ...] = tuple(SIZES)
    stepped: tuple[str, ...] = ("1m", "11m")
    timed_updates: tuple[str, ...] = ("1m", "11m")
    timed_steps: tuple[str, ...] = ("1m",)
    timed_widths: tuple[str, ...] = tuple(WIDTHS)
    growth: str = "11m"
    shares: tuple[int, ...] = (1, 2, 4, 8, 16)
    probes: tuple[int, ...] = (1, 2, 4)
    rounds: int = 5


QUICK = Scope(
    names=("adamw", "muon", "sophia_h"), compiled=("1m",), counted=("1m",), stepped=("1m",),
    timed_updates=("1m",), timed_steps=(), timed_widths=(), growth="1m", shares=(1, 16),
    probes=(1,), rounds=3,
)  # fmt: skip


def run(size: str, optimizer: str, share: int = SHARE) -> Run:
    """A train step on one device."""
    config = TrainConfig(
        model=size,
        optimizer=optimizer,
        batch_size=BATCH,
        curvature_batch=BATCH // share,
        update_interval=INTERVAL,
        basis_interval=INTERVAL if optimizer in TURNED else None,
        mesh=MeshConfig(1, 1, 1),
    )
    return resolve(config, devices=jax.devices()[:1])


def shapes(size: str) -> Any:
    """The params of a model, as shapes."""
    return jax.eval_shape(lambda: nnx.state(Transformer(SIZES[size], nnx.Rngs(0)), nnx.Param))


def cheap_loss(params: Any) -> jax.Array:
    """A loss whose curvature costs next to nothing, so that what is left is the optimizer's."""
    return sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(params))


def update_arguments(optimizer: str) -> dict[str, Any]:
    """What an update off a refresh is given. optax.contrib.sophia cannot leave out the branch."""
    if optimizer == "contrib_sophia":
        return {"hessian_fn": lambda params: cheap_loss}
    return {"refresh": False} if optimizer in SOPHIAS else {}


# --- what does not vary ---------------------------------------------------------------------------


def update_cost(size: str, optimizer: str, platform: str) -> Row:
    """The update alone, off a refresh, gradient clipping left out, over the params' bytes."""
    tx = transformation(size, optimizer)
    params = shapes(size)
    device = plan.pod(TPU)[0][0] if platform == "tpu" else jax.devices("cpu")[0]
    program = programs.donated_update(
        tx, params, SingleDeviceSharding(device), **update_arguments(optimizer)
    )
    text = program.as_text()
    count = parameter_count(SIZES[size])
    largest = max(leaf.size for leaf in jax.tree.leaves(params))
    return {
        "params": count,
        "passes": programs.main_memory_bytes(text) / (4 * count),
        "passes_by_xla": program.cost_analysis()["bytes accessed"] / (4 * count),
        "temporaries": program.memory_analysis().temp_size_in_bytes / (4 * count),
        "copies": programs.copies(text, largest),
    }


def transformation(size: str, optimizer: str) -> Any:
    """The optimizer without the clipping of gradients, which all of them share."""
    row = OPTIMIZERS[optimizer]
    h = dataclasses.replace(row.large, update_interval=INTERVAL)
    return row.transformation(h, lambda count: h.learning_rate)


def step_flops(size: str, optimizer: str, share: int = SHARE) -> Row:
    """FLOPs of a train step, without and with a refresh and on average."""
    counts = plan.step_flops(run(size, optimizer, share))
    if optimizer == "muon":  # its iteration is a loop, which XLA counts once
        counts = {name: count + muon_flops(size) for name, count in counts.items()}
    return counts


def muon_flops(size: str) -> int:
    """Of the products that make a step orthogonal."""
    tx, params = transformation(size, "muon"), shapes(size)
    state = jax.eval_shape(tx.init, params)
    return programs.product_flops(jax.make_jaxpr(tx.update)(params, state, params).jaxpr)


def compiled_step(of_run: Run) -> Row:
    """Memory of a train step, compiled for this machine's CPU."""
    cpu = mesh.make_mesh(of_run.config.mesh, jax.devices("cpu")[:1])
    lowered = plan.lowered_step(dataclasses.replace(of_run, mesh=cpu))[1]
    program = lowered.compile()
    return {
        "temp_bytes": program.memory_analysis().temp_size_in_bytes,
        "peak_bytes": plan.peak_bytes(program),
    }


def probes_cost(size: str, probes: int) -> Row:
    """A refresh of Sophia-H from several probes: FLOPs at once, memory one after another."""

    def with_probes(chunk: int) -> Run:
        estimator = functools.partial(hutchinson, num_probes=probes, probe_chunk=chunk)
        of_run = run(size, "sophia_h")
        row = dataclasses.replace(of_run.optimizer, curvature=Curvature(estimator))
        return dataclasses.replace(of_run, optimizer=row)

    # A loop over chunks would be counted once.
    return {"flops_refresh_step": plan.flops(with_probes(probes)), **compiled_step(with_probes(1))}


# --- what varies ----------------------------------------------------------------------------------


def timed_update(size: str, optimizer: str) -> Callable[[], float]:
    """Times an update off a refresh: the fastest of up to ten, at most one of them a refresh."""
    tx = transformation(size, optimizer)
    arguments = update_arguments(optimizer)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, grads: Any) -> Any:
        extra = {name: x(params) if callable(x) else x for name, x in arguments.items()}
        updates, state = tx.update(grads, state, params, **extra)
        return jax.tree.map(jnp.add, params, updates), state

    params = jax.jit(lambda: nnx.state(Transformer(SIZES[size], nnx.Rngs(0)), nnx.Param))()
    grads = jax.tree.map(lambda x: 1e-3 * x, params)
    held = [params, tx.init(params)]

    def measure() -> float:
        seconds: list[float] = []
        while len(seconds) < 2 or (len(seconds) < INTERVAL and sum(seconds) < 1):
            start = time.perf_counter()
            held[:] = jax.block_until_ready(update(*held, grads))
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    return measure


def timed_step(size: str, optimizer: str) -> Callable[[], float]:
    """Times the train step: the mean over one interval, its refresh included."""
    model = MODELS[size]
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.vocab_size, BATCH * (model.context + 1), np.int32)
    corpus = data.Corpus(tokens, tokens, tokens, model.vocab_size)
    return timing.mean_step(Trainer(run(size, optimizer)), corpus)


def timed(
    scope: Scope, names: tuple[str, ...], size: str, make: Callable[[str, str], Any]
) -> dict[str, Row]:
    """Each optimizer's seconds, and the median of their ratio to AdamW's in the same round."""
    return timing.over_adamw({name: make(size, name) for name in names}, scope.rounds)


# --- the table of all of it -----------------------------------------------------------------------


def jobs(scope: Scope) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The name of each measurement and how to make it."""
    platforms = ["cpu", *(["tpu"] if importlib.util.find_spec("libtpu") else [])]
    for size in scope.counted:
        for name in (*scope.names, *TURNED):
            yield f"flops/{size}/{name}", functools.partial(step_flops, size, name)
    device = jax.devices()[0].device_kind
    for size in scope.timed_updates:
        make = functools.partial(timed, scope, scope.names, size, timed_update)
        yield f"seconds/update/{device}/{size}", make
    for size in scope.timed_steps:
        make = functools.partial(timed, scope, scope.names, size, timed_step)
        yield f"seconds/step/{device}/{size}", make
    for size in scope.timed_widths:
        names = ("adamw", "sophia_g", *TURNED)
        make = functools.partial(timed, scope, names, size, timed_step)
        yield f"seconds/step/{device}/{size}", make
    for size in scope.stepped:
        for name in scope.names:
            yield f"memory/{size}/{name}", functools.partial(compiled_step, run(size, name))
    for share in scope.shares:
        for name in [name for name in ("sophia_h", "sophia_g") if name in scope.names]:
            key = f"share/{scope.growth}/{share}/{name}"
            yield key, functools.partial(step_flops, scope.growth, name, share)
    for probes in scope.probes:
        yield (
            f"probes/{scope.growth}/{probes}",
            functools.partial(probes_cost, scope.growth, probes),
        )
    for size in scope.compiled:
        for platform in platforms:
            for name in scope.names:
                yield (
                    f"update/{platform}/{size}/{name}",
                    functools.partial(update_cost, size, name, platform),
                )


def summary(runs: dict[str, Row]) -> dict[str, Any]:
    """Everything as a ratio to AdamW, and how the average step grows with k."""
    out: dict[str, Any] = {}
    for key, row in runs.items():
        kind, *middle, name = key.split("/")
        if kind in ("flops", "update", "memory"):
            adamw = runs.get("/".join([kind, *middle, "adamw"]), row)
            fields = ("flops_average", "passes", "passes_by_xla", "temp_bytes", "peak_bytes")
            out[key] = {f: round(row[f] / adamw[f], 4) for f in fields if f in row}
            if name in TURNED:
                often = programs.flops_with_bases_in_each_step(row, INTERVAL)
                over = round(often / adamw["flops_average"], 4)
                out[key]["flops_average_basis_in_each_step"] = over
        elif kind == "share":
            out[key] = round(row["flops_average"] / row["flops_step"], 4)
        elif kind == "probes":
            one = runs["/".join([kind, *middle, "1"])]
            out[key] = {f: round(row[f] / one[f], 4) for f in row}
        elif kind == "seconds":
            out[key] = {n: round(r["over_adamw"], 3) for n, r in row.items()}
    for name in SOPHIAS:
        sizes = [size for size in SIZES if f"flops/{size}/{name}" in runs]
        if sizes:
            row = runs[f"flops/{sizes[-1]}/{name}"]
            extra = row["flops_refresh_step"] / row["flops_step"] - 1
            growth = {k: round(1 + extra / k, 4) for k in GROWTH}
            out[f"interval/{sizes[-1]}/{name}"] = growth
    return out


def plot(runs: dict[str, Row], scope: Scope, path: Path) -> None:
    """By size, by the batch's share, the probes and k, and in time, each over AdamW's."""
    figure, grid = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    sizes = {size: parameter_count(SIZES[size]) for size in SIZES}
    over = summary(runs)
    colours = {name: f"C{index}" for index, name in enumerate((*NAMES, *TURNED))}

    def line(axes: Any, name: str, points: list[tuple[float, float]], **style: Any) -> None:
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", ms=4, color=colours[name], **style)

    def by_size(axes: Any, prefix: str, field: str, title: str) -> None:
        for name in (*NAMES, *TURNED):
            found = [(n, over.get(f"{prefix}/{s}/{name}")) for s, n in sizes.items()]
            line(axes, name, [(n, row[field]) for n, row in found if row], label=name)
        axes.set(xscale="log", xlabel="params", title=title)

    by_size(grid[0, 0], "flops", "flops_average", "FLOPs of an average train step")
    platform = "tpu" if any(key.startswith("update/tpu") for key in runs) else "cpu"
    where = f"TPU {TPU.partition(':')[0]}" if platform == "tpu" else "CPU"
    by_size(grid[0, 1], f"update/{platform}", "passes", f"memory traffic of an update, {where}")
    grid[0, 1].axhline(6 / 7, color="gray", ls=":")
    grid[0, 1].text(2.5e6, 6 / 7, "6 / 7", color="gray", backgroundcolor="white", va="center")
    by_size(grid[0, 2], "memory", "peak_bytes", "peak memory of a train step, CPU")

    by_share, by_interval, times = grid[1]
    for name in SOPHIAS:
        keys = [key for key in over if key.startswith("share/") and key.endswith(f"/{name}")]
        line(by_share, name, [(float(key.split("/")[2]), over[key]) for key in keys])
        for key in (key for key in over if key.startswith("interval/") and key.endswith(name)):
            line(by_interval, name, [(float(k), v) for k, v in over[key].items()])
    plain = runs[f"flops/{scope.growth}/sophia_h"]["flops_step"]
    probed = [(float(k.split("/")[2]), r) for k, r in runs.items() if k.startswith("probes/")]
    extra = [(n, 1 + (r["flops_refresh_step"] / plain - 1) / INTERVAL) for n, r in probed]
    line(by_share, "sophia_h", extra, ls="--")
    title = f"FLOPs, {scope.growth}; dashed: by probes, on 1/{SHARE}"
    by_share.set(xscale="log", xlabel="1 / share of the batch", title=title)
    by_interval.set(xscale="log", xlabel="k", title=f"FLOPs, {scope.counted[-1]}")
    by_share.set_xticks(scope.shares, [str(share) for share in scope.shares])
    by_interval.set_xticks(GROWTH, [str(k) for k in GROWTH])
    for axes in (by_share, by_interval):
        axes.minorticks_off()

    timings = {
        key: row for key, row in over.items() if key.startswith("seconds/") and "width" not in key
    }
    for index, name in enumerate(scope.names):
        places = [i + 0.13 * (index - 2.5) for i in range(len(timings))]
        heights = [row[name] for row in timings.values()]
        times.bar(places, heights, 0.13, color=colours[name])
    labels = [" ".join(key.split("/")[1::2]) for key in timings]
    times.set_xticks(range(len(timings)), labels)
    times.set(title=f"time, {jax.devices()[0].device_kind}, median of {scope.rounds} rounds")
    times.set_yscale("log")
    for axes in grid.flat:
        axes.axhline(1, color="gray", lw=0.8)
        axes.grid(alpha=0.25)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.suptitle(
        f"over AdamW; curvature every {INTERVAL} steps on 1/{SHARE} of the batch (contrib_sophia: "
        "on all of it)"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(quick: bool = False) -> None:
    """Measures what is missing and writes the results.

    Args:
      quick: small, and written to runs/.
    """
    scope = QUICK if quick else Scope()
    MODELS.update(SIZES | WIDTHS)
    path = (Path("runs") if quick else RESULTS) / "step_cost.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(path.read_text())["runs"] if path.exists() and not quick else {}
    for key, measure in jobs(scope):
        if key in runs:
            continue
        print(key, flush=True)
        runs[key] = measure()
        result = provenance("benchmarks.step_cost")
        if importlib.util.find_spec("libtpu"):
            result["versions"]["libtpu"] = version("libtpu")
        result["settings"] = {
            "batch": BATCH, "curvature_share": SHARE, "update_interval": INTERVAL, "tpu": TPU,
            "sizes": {name: dataclasses.asdict(SIZES[name]) for name in scope.counted},
        }  # fmt: skip
        path.write_text(json.dumps(result | {"over_adamw": summary(runs), "runs": runs}, indent=1))
    plot(runs, scope, path.with_suffix(".png"))


if __name__ == "__main__":
    tyro.cli(main)
