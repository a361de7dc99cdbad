"""AdamW, Sophia-G and Sophia-H on a GPU: losses, step times as ratios, memory, MFU.

    python -m benchmarks.gpu_run [--quick]

Each run is one `python -m examples.lm train`. A command stops after `--seconds` with exit code 3
and its run saved; the same command goes on there, and has finished once it exits with 0. Writes
`benchmarks/results/gpu_run.json` after every run. docs/how-to/gpu.md says more.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.provenance import RESULTS, provenance
from examples.lm import data

NOT_DONE = 3

# Beside the three runs of full length, how the step changes with these flags, on fewer steps.
VARIANTS = {
    "sophia_g, refresh host": ("sophia_g", ["--refresh", "host"]),
    "sophia_h, refresh host": ("sophia_h", ["--refresh", "host"]),
    "adamw, attention cudnn": ("adamw", ["--attention", "cudnn"]),
    "sophia_g, attention cudnn": ("sophia_g", ["--attention", "cudnn"]),
    "sophia_h, attention cudnn": ("sophia_h", ["--attention", "cudnn"]),
}


def prepare(folder: Path, source: str, tokenizer: str) -> None:
    """Tokenizes the text once, for all the runs."""
    if (folder / "val.bin").exists():
        return
    corpus = data.load(source, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    corpus.train.astype(np.uint16).tofile(folder / "train.bin")
    held_out = np.concatenate([corpus.tune, corpus.validation])
    held_out.astype(np.uint16).tofile(folder / "val.bin")


def train(folder: Path, flags: list[str], deadline: float) -> str:
    """Starts or continues a run; returns "done", "stopped" by the deadline, or its last words."""
    if (folder / "summary.json").exists():
        return "done"
    resume = ["--resume"] if (folder / "run.json").exists() else []
    command = [sys.executable, "-m", "examples.lm", "train", *flags, *resume, "--out", str(folder)]
    log = folder.with_suffix(".log")
    with log.open("a") as output, subprocess.Popen(command, stdout=output, stderr=output) as run:
        try:
            run.wait(max(deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGTERM)
    if run.returncode not in (0, -signal.SIGTERM):
        return log.read_text().strip().splitlines()[-1]
    return "done" if (folder / "summary.json").exists() else "stopped"


def seconds_of(lines: list[dict[str, Any]], tokens: int) -> tuple[float, float]:
    """Medians of steps without and with an estimate, the first few of a process left out."""
    speeds = [(line["step"], line.get("tokens_per_second")) for line in lines[5:]]
    steps = [(step, tokens / speed) for step, speed in speeds if speed]  # none where it compiled
    plain = [seconds for step, seconds in steps if step % 10]
    refresh = [seconds for step, seconds in steps if step % 10 == 0]
    return float(np.median(plain)), float(np.median(refresh))


def figures(folder: Path) -> dict[str, Any]:
    """A finished run's numbers."""
    summary = json.loads((folder / "summary.json").read_text())
    (result,) = summary["runs"].values()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    tokens = summary["config"]["batch_size"] * summary["context"]
    plain, refresh = seconds_of(training, tokens)
    shares = [line["mfu"] for line in training[5:] if "mfu" in line and line["step"] % 10]
    return {
        "validation_loss": {line["step"]: line["val_loss"] for line in lines if "val_loss" in line},
        "plain_step_seconds": plain,
        "refresh_step_seconds": refresh,
        "step_seconds": 0.9 * plain + 0.1 * refresh,
        "mfu": float(np.median(shares)) if shares else None,
        "peak_bytes": result["peak_bytes"],
        "win_rate": result["win_rate"],
    }


def ratios(runs: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Step times over AdamW's with the same attention, and those of `lax.cond` over the host's."""
    out = {}
    for name, run in runs.items():
        optimizer, _, flags = name.partition(", ")
        base = runs.get("adamw, attention cudnn" if "cudnn" in flags else "adamw")
        if optimizer != "adamw" and base:
            out[f"{name} / adamw"] = run["step_seconds"] / base["step_seconds"]
        if flags == "refresh host" and optimizer in runs:
            for kind in ("plain_step_seconds", "refresh_step_seconds"):
                label = f"{optimizer}: cond / host, {kind.split('_')[0]} step"
                out[label] = runs[optimizer][kind] / run[kind]
    return out


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2-124m")
    parser.add_argument("--data", default="packages")
    parser.add_argument("--tokenizer", default="bpe:50257")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--variant-steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--curvature-batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=540, help="for this command")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu_run.json")
    parser.add_argument("--quick", action="store_true", help="two tiny runs, to see that it works")
    config = parser.parse_args()
    if config.quick:
        config.model, config.data, config.tokenizer = "tiny", "stdlib", "bytes"
        config.steps = config.variant_steps = 12
        config.batch_size, config.curvature_batch = 2, 1
        config.out, config.results = Path("runs/gpu-quick"), Path("runs/gpu_run.json")
    return config


def main() -> int:
    """Runs what is missing, as far as the time goes, and writes the results."""
    config, started = arguments(), time.monotonic()
    prepare(config.out / "tokens", config.data, config.tokenizer)
    names = ("adamw", "sophia_g") if config.quick else ("adamw", "sophia_g", "sophia_h")
    runs = {name: (name, []) for name in names} | ({} if config.quick else VARIANTS)
    result: dict[str, Any] = {**provenance("benchmarks.gpu_run"), "runs": {}, "failed": {}}
    for name, (optimizer, flags) in runs.items():
        folder = config.out / re.sub(r"\W+", "-", name)
        steps = config.variant_steps if flags else config.steps
        settings = {
            "--model": config.model,
            "--data": f"bin:{config.out / 'tokens'}",
            "--optimizer": optimizer,
            "--steps": steps,
            "--batch-size": config.batch_size,
            "--curvature-batch": config.curvature_batch,
            "--eval-interval": max(steps // 4, 1),
            "--save-interval": max(steps // 4, 1),
            "--keep": 1,
            "--log-interval": 1,
        }
        every = [str(part) for setting in settings.items() for part in setting]
        outcome = train(folder, [*every, *flags], started + config.seconds)
        print(f"{name}: {outcome}", flush=True)
        if outcome == "stopped":
            return NOT_DONE
        if outcome == "done":
            result["runs"][name] = figures(folder)
            result["device"] = json.loads((folder / "summary.json").read_text())["device"]
        else:
            result["failed"][name] = outcome
        result["ratios"] = ratios(result["runs"])
        config.results.parent.mkdir(parents=True, exist_ok=True)
        config.results.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["ratios"], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
