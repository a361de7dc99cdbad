"""What a training step costs on an accelerator: seconds over AdamW's, MFU and memory.

    python -m benchmarks.gpu_run [--model gpt2-124m] [--quick]

Every row is the train step of `examples.lm` with one optimizer and its flags. All rows are compiled
first, side by side, then timed in turns, from one curvature estimate to the next, so that a slow
moment counts for all. The memory is what XLA reports of the compiled step. Writes
`results/gpu_run.json`, one entry for each model, after each compilation and each round.
docs/how-to/gpu.md says more.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax

from benchmarks.lib.provenance import RESULTS, provenance
from examples.lm import data, flops, plan, timing
from examples.lm.config import MODELS, MeshConfig, TrainConfig
from examples.lm.run import resolve
from examples.lm.train import Trainer

# The optimizer and the flags of each row.
ROWS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {},
    "sophia_g": {},
    "sophia_h": {},
    "sophia_g_eigenbasis": {"basis_interval": 10},
    "sophia_g_eigenbasis, basis every step": {"basis_interval": 1},
    "soap": {"basis_interval": 10},
    "sophia_g, refresh host": {"refresh": "host"},
    "sophia_h, refresh host": {"refresh": "host"},
}
CUDNN = {
    f"{name}, attention cudnn": ROWS[name] | {"attention": "cudnn"}
    for name in ("adamw", "sophia_g", "sophia_h", "sophia_g_eigenbasis")
}


def trainer_of(name: str, flags: dict[str, Any], config: argparse.Namespace) -> Trainer:
    """The compiled step of a row, on one device."""
    run = resolve(
        TrainConfig(
            model=config.model,
            optimizer=name.partition(",")[0],
            batch_size=config.batch_size,
            curvature_batch=config.curvature_batch,
            mesh=MeshConfig(1, 1, 1),
            **flags,
        ),
        devices=jax.devices()[:1],
    )
    return plan.trainer_of(run)


def compile_step(trainer: Trainer) -> dict[str, Any]:
    """Compiles a row's programs into the cache."""
    started = time.perf_counter()
    programs = [
        plan.traced(trainer, refresh).compile()
        for refresh in {trainer.program_at(0), trainer.program_at(1)}
    ]
    return {
        "compile_seconds": time.perf_counter() - started,
        "peak_bytes": max(plan.peak_bytes(program) for program in programs),
    }


def figures(trainer: Trainer, turns: list[timing.Times]) -> dict[str, Any]:
    """A row's numbers, from its turns."""
    steps = [step for seconds, flags in turns for step in zip(seconds, flags, strict=True)]
    refresh = [seconds for seconds, refreshed in steps if refreshed]
    model, tokens = trainer.run.model, trainer.run.config.batch_size * trainer.run.model.context
    average = statistics.median(statistics.mean(seconds) for seconds, _ in turns)
    return {
        "plain_step_seconds": statistics.median(s for s, refreshed in steps if not refreshed),
        "refresh_step_seconds": statistics.median(refresh) if refresh else None,
        "step_seconds": average,
        "mfu": flops.utilization(model, tokens / average, jax.devices()[:1]),
    }


def over_adamw(name: str, turns: dict[str, list[timing.Times]]) -> float:
    """The median over the rounds of an average step's seconds over AdamW's, attention alike."""
    base = turns["adamw, attention cudnn" if "cudnn" in name else "adamw"]
    rounds = zip(turns[name], base, strict=True)
    return statistics.median(statistics.mean(a[0]) / statistics.mean(b[0]) for a, b in rounds)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2-124m")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--curvature-batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu_run.json")
    parser.add_argument("--quick", action="store_true", help="two tiny rows, to see that it works")
    config = parser.parse_args()
    if config.quick:
        config.model, config.batch_size, config.rounds = "tiny", 2, 1
        config.results = Path("runs/gpu_run.json")
    return config


def main() -> None:
    """Compiles and times every row, and writes the results."""
    config = arguments()
    rows = ROWS | (CUDNN if jax.default_backend() == "gpu" else {})
    if config.quick:
        rows = {name: rows[name] for name in ("adamw", "sophia_g_eigenbasis")}
    results: dict[str, dict[str, Any]] = {name: {} for name in rows}
    origin = {
        **provenance("benchmarks.gpu_run"),
        "device": jax.devices()[0].device_kind,
        "model": dataclasses.asdict(MODELS[config.model]),
        **{name: vars(config)[name] for name in ("batch_size", "curvature_batch", "rounds")},
    }

    def write() -> None:
        config.results.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(config.results.read_text()) if config.results.exists() else {}
        known[config.model] = {**origin, "rows": results}
        config.results.write_text(json.dumps(known, indent=2) + "\n")

    corpus = data.load("stdlib")
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        trainers = {name: trainer_of(name, flags, config) for name, flags in rows.items()}
        with ThreadPoolExecutor() as pool:
            compiling = {pool.submit(compile_step, trainers[name]): name for name in rows}
            for done in as_completed(compiling):
                results[compiling[done]] |= done.result()
                print(compiling[done], done.result(), flush=True)
                write()
        turns: dict[str, list[timing.Times]] = {name: [] for name in rows}
        for trainer in trainers.values():
            timing.turn(trainer, corpus)  # loads the programs
        for _ in range(config.rounds):
            for name, trainer in trainers.items():
                turns[name].append(timing.turn(trainer, corpus))
            for name, trainer in trainers.items():
                ratio = {"step_seconds_over_adamw": over_adamw(name, turns)}
                results[name] |= figures(trainer, turns[name]) | ratio
            write()
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
