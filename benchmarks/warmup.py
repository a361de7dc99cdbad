"""Why Sophia wants a longer warm-up than AdamW, and whether something else can take its place.

    python -m benchmarks.warmup [--quick]

Three questions, on the small regime of `lm_race`, at its tuned points, judged on the `tune` split:

* where: warm-up is short for one kind of params and long for the others, and the other way round;
* what: the win rate and the curvature of every kind, refresh by refresh, with either warm-up;
* instead: changes to the algorithm that might do without, each at both warm-ups and several
  learning rates, compared with the algorithm as it is.

Runs are kept as those of `lm_race` are, in `results/warmup.jsonl`; `results/warmup.json` holds the
tables and `warmup.png` the plot.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro

from benchmarks.lib.journal import Journal
from benchmarks.lib.provenance import RESULTS, provenance
from benchmarks.lib.sweep import Runs, Workload
from benchmarks.lm_race import QUICK, REGIMES
from examples.lm import data
from examples.lm.optimizers import (
    OPTIMIZERS,
    Curvature,
    Optimizer,
    is_matrix,
    learning_rate,
    map_by_name,
)
from examples.lm.run import Run
from examples.lm.train import Trainer
from examples.lm.tune import Point
from sophia_optax._scale_by_sophia import SophiaRule, transformation
from sophia_optax._win_rate_target import FixedGamma

SHORT, LONG = 0.02, 0.2
STEPS = REGIMES["small"].steps
TUNED: dict[str, Point] = {
    "sophia_h_paper": {"learning_rate": 4e-3, "gamma": 0.02, "b1": 0.7},
    "sophia_g": {"learning_rate": 3e-3, "gamma": 0.1, "b1": 0.8},
}
RATES = {"sophia_h_paper": (3e-3, 4e-3, 6e-3, 8e-3), "sophia_g": (2e-3, 3e-3, 4e-3, 6e-3)}


# --- kinds of params ------------------------------------------------------------------------------

ALL = np.s_[...]
KINDS: dict[str, dict[str, Any]] = {
    "embedding": {"embedding": ALL},
    "positions": {"positions": ALL},
    "query, key": {"qkv": np.s_[:, :, :2]},
    "value, out": {"qkv": np.s_[:, :, 2:], "out": ALL},
    "mlp": {"up": ALL, "down": ALL},
    "norms, biases": {"scale": ALL, "bias": ALL, "qkv_bias": ALL, "out_bias": ALL}
    | {"up_bias": ALL, "down_bias": ALL},
}


def in_kind(kind: str, params: Any) -> Any:
    """Booleans in the shapes of the params: which coordinates are of a kind."""

    def chosen(name: str, leaf: jax.Array) -> jax.Array:
        none = jnp.zeros(leaf.shape, bool)
        return none.at[KINDS[kind][name]].set(True) if name in KINDS[kind] else none

    return map_by_name(chosen, params)


# --- changes to the algorithm ---------------------------------------------------------------------


class Change(NamedTuple):
    """One difference from the algorithm.

    Attributes:
      negative: what a coordinate with h <= 0 does: a "sign" step, as in the paper; a step by |h|
        ("size"), as in the library; no step ("rest"); or the step of the tensor's mean |h|
        ("mean").
      nesterov: look one gradient ahead in m.
      correct_m: divide m by 1 - b1^t.
      probes: of an estimate.
      dense: estimate in every one of the first so many steps.
      ramp: the clip threshold grows from 0 to 1 over so many steps, instead of the learning rate.
      square: average ĥ² and take the root, as AdaHessian does.
      floor: the least h of a coordinate, as a share of the tensor's mean |h|.
      late_interval: steps from one estimate to the next in the second half of the run.
      last_b1: b1 goes there in a straight line over the run.
      clip_norm: the largest global norm of a gradient; None takes the row's.
    """

    negative: str = "sign"
    nesterov: bool = False
    correct_m: bool = False
    probes: int = 1
    dense: int = 0
    ramp: int = 0
    square: bool = False
    floor: float = 0.0
    late_interval: int = 10
    last_b1: float | None = None
    clip_norm: float | None = None


CHANGES = {
    "as it is": Change(),
    "|h| where negative": Change(negative="size"),
    "no step where negative": Change(negative="rest"),
    "tensor's mean where negative": Change(negative="mean"),
    "floor: tensor's mean / 10": Change(floor=0.1),
    "root of the mean square": Change(square=True),
    "Nesterov": Change(nesterov=True),
    "m corrected": Change(correct_m=True),
    "4 probes": Change(probes=4),
    "estimates in each of 20 steps": Change(dense=20),
    "clip grows over 100 steps": Change(ramp=100),
    "|h|, k = 50 in the second half": Change(negative="size", late_interval=50),
    "|h|, b1 rises to 0.9": Change(negative="size", last_b1=0.9),
    "|h|, gradients not clipped": Change(negative="size", clip_norm=1e9),
}


@dataclass(frozen=True)
class ChangedRule(SophiaRule):
    """The library's equations with one difference.

    Attributes:
      change: what is different.
      count: the steps before this one.
    """

    change: Change = Change()  # noqa: RUF009 - a NamedTuple, immutable
    count: Any = 0

    def lookahead(self, m: jax.Array, g: jax.Array) -> jax.Array:
        ahead = super().lookahead(m, g)
        return ahead / (1 - self.b1 ** (self.count + 1)) if self.change.correct_m else ahead

    def curvature(self, h: jax.Array, estimate: jax.Array) -> jax.Array:
        return super().curvature(h, estimate**2 if self.change.square else estimate)

    def scale(self, gamma: Any, refreshes: Any) -> Any:
        scale = super().scale(gamma, refreshes)
        return jnp.sqrt(gamma * scale) if self.change.square else scale

    def scaled_curvature(self, h: jax.Array, scale: Any) -> jax.Array:
        scaled = super().scaled_curvature(jnp.sqrt(h) if self.change.square else h, scale)
        mean = jnp.mean(jnp.abs(scaled))
        if self.change.negative == "rest":
            scaled = jnp.where(scaled > 0, scaled, jnp.inf)
        elif self.change.negative == "mean":
            scaled = jnp.where(scaled > 0, scaled, mean)
        return jnp.maximum(scaled, self.change.floor * mean) if self.change.floor else scaled


def changed_sophia(h: Any, change: Change) -> optax.GradientTransformationExtraArgs:
    """`scale_by_sophia` with one change."""

    def at(count: Any) -> optax.GradientTransformationExtraArgs:
        b1, ramp = h.b1, change.ramp
        if change.last_b1 is not None:
            b1 += (change.last_b1 - b1) * jnp.minimum(count / STEPS, 1)
        rule = ChangedRule(
            b1=b1,
            b2=h.b2,
            eps=1e-12,
            clip_threshold=jnp.clip((count + 1) / ramp, 0, 1) if ramp else 1.0,
            absolute_curvature=change.negative == "size",
            nesterov=change.nesterov,
            change=change,
            count=count,
        )
        return transformation(rule, FixedGamma(h.gamma))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        return at(state.count).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(at(0).init, update)


def other_warmup(kind: str, schedule: Any) -> optax.GradientTransformation:
    """Gives one kind of params the long warm-up where the schedule's is short, or the reverse."""
    bound = schedule.keywords  # the trainer's schedule is a partial of `learning_rate`
    opposite = jnp.where(bound["warmup"] < (SHORT + LONG) / 2, LONG, SHORT)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        other = learning_rate(state.count, **(bound | {"warmup": opposite}))
        ratio = other / jnp.maximum(schedule(state.count), 1e-30)
        updates = jax.tree.map(
            lambda u, chosen: jnp.where(chosen, ratio * u, u), updates, in_kind(kind, updates)
        )
        return updates, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(
        lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update
    )


def changed_row(name: str, change: Change, other: str | None = None) -> Optimizer:
    """A Sophia's row with one change, or with another warm-up for one kind of params."""
    row = OPTIMIZERS[name]

    def estimator(forward: Any, params: Any, batch: Any) -> Any:
        one = row.curvature.estimator(forward, params, batch)

        def mean(key: jax.Array) -> Any:
            keys = jax.random.split(key, change.probes)
            return jax.tree.map(lambda x: x.mean(0), jax.lax.map(one, keys))

        return one if change.probes == 1 else mean

    def build(h: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
        return optax.chain(
            changed_sophia(h, change),
            optax.add_decayed_weights(h.weight_decay, is_matrix),
            optax.scale_by_learning_rate(schedule),
            *([other_warmup(other, schedule)] if other else []),
        )

    clip_norm = row.tiny.clip_norm if change.clip_norm is None else change.clip_norm
    return replace(
        row,
        build=build,
        curvature=Curvature(estimator),
        tiny=replace(row.tiny, clip_norm=clip_norm),
    )


class ChangedTrainer(Trainer):
    """A trainer for one change, with every kind's diagnostics if they are watched."""

    def __init__(self, run: Run, *, change: Change, watch: bool = False):
        self.change, self.watch = change, watch
        super().__init__(run, traced=True, unroll=True)

    def refreshes_at(self, step: int) -> bool:
        """More often at the beginning or less often in the second half, if the change says so."""
        if step >= STEPS // 2:
            return step % self.change.late_interval == 0
        return super().refreshes_at(step) or step < self.change.dense

    def diagnostics(self, opt_state: Any) -> dict[str, Any]:
        """Win rate, mean h, share of negative h and size of the step for every kind."""
        found = super().diagnostics(opt_state)
        if not self.watch:
            return found
        m, nu = (optax.tree.get(opt_state, name) for name in ("mu", "nu"))
        corrected = 1 - 0.99 ** optax.tree.get(opt_state, "refreshes")
        h = jax.tree.map(lambda n: n / corrected, nu)
        u = jax.tree.map(lambda m, h: m / jnp.maximum(found["gamma"] * h, 1e-12), m, h)

        def mean(chosen: Any, of: Callable[[Any, Any], Any]) -> jax.Array:
            total = jax.tree.map(lambda c, u, h: jnp.sum(c * of(u, h)), chosen, u, h)
            return jnp.divide(optax.tree.sum(total), optax.tree.sum(chosen))

        for kind in KINDS:
            chosen = in_kind(kind, nu)
            found |= {
                f"{kind}: win rate": mean(chosen, lambda u, _: jnp.abs(u) < 1),
                f"{kind}: h": mean(chosen, lambda _, h: h),
                f"{kind}: negative": mean(chosen, lambda _, h: h <= 0),
                f"{kind}: step": jnp.sqrt(mean(chosen, lambda u, _: jnp.clip(u, -1, 1) ** 2)),
            }
        return found


# --- the experiments ------------------------------------------------------------------------------


@dataclass(frozen=True)
class WarmupConfig:
    """What to run.

    Attributes:
      optimizers: names in `TUNED`.
      parts: of "what", "where" and "instead".
      changes: names in `CHANGES`.
      seeds: of the runs.
      quick: a few steps of each, to see that it runs; writes no results.
      runs: the file of finished runs.
    """

    optimizers: tuple[str, ...] = tuple(TUNED)
    parts: tuple[str, ...] = ("what", "instead", "where")
    changes: tuple[str, ...] = tuple(CHANGES)
    seeds: tuple[int, ...] = (1000, 1001)
    quick: bool = False
    runs: Path = RESULTS / "warmup.jsonl"

    @property
    def steps(self) -> int:
        """Of every run."""
        return 20 if self.quick else STEPS

    @property
    def workload(self) -> Workload:
        """Of every run."""
        return (QUICK if self.quick else REGIMES["small"]).workload


class Study:
    """Runs what is asked for, or reads it from the journal."""

    def __init__(self, config: WarmupConfig, journal: Journal, corpus: data.Corpus):
        self.config, self.journal, self.corpus = config, journal, corpus
        self.sweeps: dict[str, Runs] = {}

    def run(
        self,
        part: str,
        optimizer: str,
        name: str,
        rates: tuple[float, ...],
        seed: int,
        change: Change = Change(),  # noqa: B008
        other: str | None = None,
    ) -> None:
        """Either warm-up at each learning rate; compiles when a first run is missing."""
        key = f"{part}/{optimizer}/{name}"
        if key not in self.sweeps:
            self.sweeps[key] = Runs(
                self.journal,
                self.corpus,
                self.config.workload.run(changed_row(optimizer, change, other)),
                functools.partial(ChangedTrainer, change=change, watch=part == "what"),
                part=part,
                optimizer=optimizer,
                name=name,
            )
        for rate in rates:
            for warmup in (SHORT, LONG):
                point = {**TUNED[optimizer], "learning_rate": rate, "warmup": warmup}
                self.sweeps[key](point, self.config.steps, seed, "tune")

    def watch_kinds(self, optimizer: str) -> None:
        """The algorithm as it is, with the diagnostics of every kind."""
        self.run(
            "what",
            optimizer,
            "as it is",
            (TUNED[optimizer]["learning_rate"],),
            self.config.seeds[0],
        )

    def vary_warmup_by_kind(self, optimizer: str, seed: int) -> None:
        """One kind's warm-up is short where the others' is long, or long where theirs is short."""
        for kind in (None, *KINDS):
            self.run(
                "where",
                optimizer,
                kind or "none",
                (TUNED[optimizer]["learning_rate"],),
                seed,
                other=kind,
            )

    def vary_the_algorithm(self, optimizer: str, seed: int) -> None:
        """Every change at either warm-up and several learning rates."""
        for name in self.config.changes:
            self.run("instead", optimizer, name, RATES[optimizer], seed, CHANGES[name])


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The tables: losses by seed for every part, optimizer, name, warm-up and learning rate."""
    tables: dict[str, Any] = {}
    for row in rows:
        key = row["key"]
        if key["part"] == "what":
            continue
        table = tables.setdefault(key["part"], {}).setdefault(key["optimizer"], {})
        point = f"warmup {key['warmup']}, learning_rate {key['learning_rate']}"
        table.setdefault(key["name"], {}).setdefault(point, []).append(row["loss"])
    return tables


def plot(rows: list[dict[str, Any]], tables: dict[str, Any], path: Path) -> None:
    """What each kind does under either warm-up, and what each change is worth."""
    optimizers = [o for o in TUNED if o in tables.get("instead", {})]
    figure, grid = plt.subplots(
        len(optimizers), 3, figsize=(16, 4.2 * len(optimizers)), layout="constrained", squeeze=False
    )
    for axes, optimizer in zip(grid, optimizers, strict=True):
        watched = [
            r for r in rows if r["key"]["part"] == "what" and r["key"]["optimizer"] == optimizer
        ]
        for row, style in zip(watched, ("--", "-"), strict=False):
            for index, kind in enumerate(KINDS):
                label = kind if style == "-" else None
                steps = 10 * np.arange(len(row["win_rates"]))
                axes[0].plot(
                    steps, row["more"][f"{kind}: win rate"], f"C{index}{style}", label=label, lw=1
                )
                axes[1].plot(steps, row["more"][f"{kind}: h"], f"C{index}{style}", lw=1)
        axes[0].set(title=f"{optimizer}: win rate (dashed: short warm-up)", xlabel="step")
        axes[0].legend(fontsize=7)
        axes[1].set(title="mean h", xlabel="step", yscale="log")
        for offset, (warmup, color) in enumerate(((SHORT, "C3"), (LONG, "C0"))):
            for place, points in enumerate(tables["instead"][optimizer].values()):
                losses = points.get(f"warmup {warmup}, learning_rate {RATES[optimizer][2]}", [])
                axes[2].plot(
                    losses,
                    [place + 0.2 * offset] * len(losses),
                    "o",
                    color=color,
                    ms=4,
                    label=f"warm-up {warmup:.0%}" if place == 0 else None,
                )
        names = list(tables["instead"][optimizer])
        axes[2].set_yticks(range(len(names)), names, fontsize=8)
        axes[2].invert_yaxis()
        axes[2].set(title=f"loss of each seed at learning rate {RATES[optimizer][2]}")
        axes[2].legend(fontsize=8)
        axes[2].grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(config: WarmupConfig) -> None:
    """Runs what is missing and writes the tables and the plot."""
    if config.quick:
        few = {
            "optimizers": ("sophia_h_paper",),
            "parts": ("what", "instead"),
            "changes": ("as it is",),
        }
        config = replace(config, seeds=(1000,), **few)
    origin = provenance("benchmarks.warmup")
    journal = Journal(None if config.quick else config.runs)
    study = Study(config, journal, data.load("stdlib"))
    for optimizer in config.optimizers:
        if "what" in config.parts:
            study.watch_kinds(optimizer)
    for seed in config.seeds:
        for optimizer in config.optimizers:
            if "instead" in config.parts:
                study.vary_the_algorithm(optimizer, seed)
            if "where" in config.parts:
                study.vary_warmup_by_kind(optimizer, seed)
    if config.quick:
        return
    tables = summarize(journal.rows)
    settings = {"short": SHORT, "long": LONG, "points": TUNED, "steps": config.steps}
    watched = [row for row in journal.rows if row["key"]["part"] == "what"]
    result = {**origin, "settings": settings, "results": tables, "watched": watched}
    (RESULTS / "warmup.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(journal.rows, tables, RESULTS / "warmup.png")


if __name__ == "__main__":
    main(tyro.cli(WarmupConfig))
