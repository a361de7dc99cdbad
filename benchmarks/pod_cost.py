"""What a training step costs on TPU pods from 4 chips to 256, compiled ahead of time.

    pip install -e '.[examples,tpu]'
    python -m benchmarks.pod_cost [--quick]

No TPU is needed. Each row is one `python -m examples.lm plan`, of a minute or more; those that are
in `benchmarks/results/pod_cost.json` already are not compiled again. Draws `pod_cost.png` as well.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro

from benchmarks.lib.programs import flops_with_bases_in_each_step
from benchmarks.lib.provenance import RESULTS, commit, provenance
from examples.lm.plan import PlanConfig

OPTIMIZERS = ("adamw", "sophia_g", "sophia_h")
TOPOLOGIES = {4: "v5e:2x2", 16: "v5e:4x4", 64: "v5e:8x8", 256: "v5e:16x16"}
GB, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Plan:
    """One plan: the flags of `python -m examples.lm plan`.

    Attributes:
      optimizer: a name in `examples.lm.optimizers.OPTIMIZERS`.
      topology: the pod.
      batch_per_chip: sequences that a chip sees in a step.
      accumulate: microbatches that they are cut into.
      curvature_share: a curvature estimate sees 1 / this of the batch.
      model: a name in `examples.lm.config.MODELS`.
    """

    optimizer: str
    topology: str = TOPOLOGIES[16]
    batch_per_chip: int = 16
    accumulate: int = 4
    curvature_share: int = 16
    model: str = "gpt2-124m"

    @property
    def flags(self) -> list[str]:
        """The command's arguments."""
        flags = []
        for key, value in dataclasses.asdict(self).items():
            flags += [f"--{key.replace('_', '-')}", str(value)]
        return flags


def whole(optimizer: str) -> Plan:
    """A step without microbatches: what optax.contrib.sophia differentiates, it does so at once."""
    return Plan(optimizer, batch_per_chip=4, accumulate=1, curvature_share=4)


PLANS = (
    *(Plan(name) for name in (*OPTIMIZERS, "sophia_g_eigenbasis", "soap", "contrib_sophia")),
    *(whole(name) for name in ("adamw", "contrib_sophia")),
    *(Plan(name, TOPOLOGIES[n]) for n in (256, 4, 64) for name in ("adamw", "sophia_g")),
    Plan("sophia_g", TOPOLOGIES[256], model="gpt2-1.5b"),
    *(Plan("sophia_h", TOPOLOGIES[n]) for n in (256, 4, 64)),
)


def planned(plan: Plan) -> dict[str, Any]:
    """One plan's numbers, how long it took and at which commit."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "examples.lm", "plan", *plan.flags, "--json", str(path)]
        done = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False)
        if done.returncode not in (0, 2):  # 2: it does not fit, by the numbers that are there
            done.check_returncode()
        row = json.loads(path.read_text())[plan.optimizer]
    seconds = round(time.perf_counter() - start, 1)
    return {**dataclasses.asdict(plan), **row, "seconds": seconds, "commit": commit()}


def find(rows: list[dict[str, Any]], plan: Plan) -> dict[str, Any] | None:
    """The row of a plan, if it is there."""
    wanted = dataclasses.asdict(plan)
    return next((row for row in rows if wanted.items() <= row.items()), None)


def moved_bytes(row: dict[str, Any]) -> int:
    """What the collectives of a step with all refreshes move."""
    return sum(kind["bytes"] for kind in row["collectives"].values())


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Temporaries and average FLOPs over those of AdamW on the same pod with the same batch."""
    found = []
    for row in rows:
        flags = {f.name: row[f.name] for f in dataclasses.fields(Plan)}
        adamw = find(rows, Plan(**{**flags, "optimizer": "adamw"}))
        if adamw and row is not adamw:
            both = [key for key in COMPARED if key in row and key in adamw]
            over = {f"{key}_over_adamw": row[key] / adamw[key] for key in both}
            if row.get("flops_basis_step", row["flops_step"]) != row["flops_step"]:
                often = flops_with_bases_in_each_step(row, PlanConfig().update_interval)
                over["flops_basis_in_each_step_over_adamw"] = often / adamw["flops_average"]
            if row["collectives"]:
                over["moved_bytes_over_adamw"] = moved_bytes(row) / moved_bytes(adamw)
            found.append({**flags, **over, "fits": row["peak_bytes"] <= row["hbm_bytes"]})
    return found


COMPARED = (
    "state_bytes", "temp_bytes", "peak_bytes", "flops_step", "flops_average", "compile_seconds",
)  # fmt: skip


def growth(rows: list[dict[str, Any]], optimizer: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Chips and numbers, for the pods that are planned."""
    for chips, topology in TOPOLOGIES.items():
        row = find(rows, Plan(optimizer, topology))
        if row:
            yield chips, row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Memory and FLOPs of a chip by the size of the pod, and both over AdamW's."""
    figure, (memory, flops, over) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for index, name in enumerate(OPTIMIZERS):
        line = list(growth(rows, name))
        chips = [n for n, _ in line]
        style = {"color": f"C{index}", "marker": "os^"[index], "ms": 9 - 2 * index, "label": name}
        memory.plot(chips, [row["peak_bytes"] / GB for _, row in line], **style)
        flops.plot(chips, [row["flops_average"] / TERA for _, row in line], **style)
    hbm = rows[0]["hbm_bytes"] / GB
    memory.axhline(hbm, color="gray", ls=":", label="a v5e chip has")
    memory.set(ylim=(0, 1.1 * hbm), ylabel="GB", title="peak memory a chip")
    top = max(row["flops_average"] for row in rows if row["model"] == "gpt2-124m") / TERA
    flops.set(ylim=(0, 1.2 * top), ylabel="TFLOP", title="FLOPs a chip, average step")
    for axes in (memory, flops):
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(TOPOLOGIES), [str(n) for n in TOPOLOGIES])
        axes.set_xlabel("chips, 16 sequences each")
        axes.grid(alpha=0.25)
        axes.legend(loc="lower right")
    shown = {
        "sophia_g\non 1/16": (Plan("sophia_g"), Plan("adamw")),
        "sophia_h\non 1/16": (Plan("sophia_h"), Plan("adamw")),
        "optax.contrib.\nsophia on all": (whole("contrib_sophia"), whole("adamw")),
    }
    bars = (-0.2, "temp_bytes", "temporaries"), (0.2, "flops_average", "average FLOPs")
    for offset, key, label in bars:
        heights = [find(rows, one)[key] / find(rows, adamw)[key] for one, adamw in shown.values()]
        drawn = over.bar([i + offset for i in range(len(shown))], heights, 0.4, label=label)
        over.bar_label(drawn, fmt="%.3f", fontsize=9)
    over.set_xticks(range(len(shown)), list(shown))
    over.axhline(1, color="gray", ls=":")
    over.set(ylim=(0, 2.4), title="over AdamW, on 16 chips")
    over.legend(loc="upper left")
    figure.suptitle("GPT-2 124M, one training step on TPU v5e, fully sharded")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(quick: bool = False) -> None:
    """Compiles what is missing and writes the results.

    Args:
      quick: one small plan, not written.
    """
    if quick:
        print(json.dumps(planned(Plan("sophia_g", TOPOLOGIES[4], model="tiny"))))
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "pod_cost.json"
    rows = json.loads(path.read_text())["plans"] if path.exists() else []
    for plan in PLANS:
        if find(rows, plan):
            continue
        rows.append(planned(plan))
        result = provenance("benchmarks.pod_cost")
        result["versions"]["libtpu"] = version("libtpu")
        result |= {"over_adamw": ratios(rows), "plans": rows}
        path.write_text(json.dumps(result, indent=2) + "\n")
    plot(rows, RESULTS / "pod_cost.png")
    print(json.dumps(ratios(rows), indent=2))


if __name__ == "__main__":
    tyro.cli(main)
