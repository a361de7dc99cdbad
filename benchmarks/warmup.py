"""Why Sophia wants a longer warm-up than AdamW, and whether something else can take its place.

    python -m benchmarks.warmup [--quick]

Three questions, on the small regime of `lm_race`, at its tuned points, judged on the `tune` split:

* where: warm-up is short for one kind of params and long for the others, and the other way round;
* what: the win rate and the curvature of every kind, refresh by refresh, with either warm-up;
* instead: changes to the algorithm that might do without, each at both warm-ups and several
  learning rates, beside the algorithm as it is.

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

import sophia_optax
from benchmarks.entrants import ENTRANTS, Point
from benchmarks.journal import Journal, Runs
from benchmarks.lm_race import REGIMES
from benchmarks.provenance import RESULTS, provenance
from benchmarks.runner import Runner, Setting, cosine
from examples.lm import data
from examples.lm.optimizers import Optimizer, is_matrix

SHORT, LONG = 0.02, 0.2
STEPS = REGIMES["small"].steps
TUNED: dict[str, Point] = {
    "sophia_h": {"learning_rate": 4e-3, "gamma": 0.02, "b1": 0.7},
    "sophia_g": {"learning_rate": 3e-3, "gamma": 0.1, "b1": 0.8},
}
RATES = {"sophia_h": (3e-3, 4e-3, 6e-3, 8e-3), "sophia_g": (2e-3, 3e-3, 4e-3, 6e-3)}


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

    def chosen(path: Any, leaf: Any) -> jax.Array:
        name = next(key.key for key in reversed(path) if isinstance(getattr(key, "key", 0), str))
        none = jnp.zeros(leaf.shape, bool)
        return none.at[KINDS[kind][name]].set(True) if name in KINDS[kind] else none

    return jax.tree_util.tree_map_with_path(chosen, params)


# --- changes to the algorithm ---------------------------------------------------------------------


class Change(NamedTuple):
    """One difference from the algorithm.

    Attributes:
      negative: what a coordinate with h <= 0 does: a "sign" step; |h| in its place ("size"); no
        step ("rest"); or the step of the tensor's mean |h| ("mean").
      nesterov: look one gradient ahead in m.
      correct_m: divide m by 1 - b1^t.
      probes: of an estimate.
      dense: estimate in every one of the first so many steps.
      ramp: the clip threshold grows from 0 to 1 over so many steps, in place of the learning rate.
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


def changed_sophia(
    h: Any, schedule: optax.Schedule, change: Change, factor: Callable[[Any, Any], Any]
) -> optax.GradientTransformationExtraArgs:
    """Sophia with one change, for experiments: the state is the library's, the update is not.

    Args:
      h: hyperparameters.
      schedule: the learning rate.
      change: what is different.
      factor: (params, step) to what each coordinate's update is multiplied by.
    """

    def init(params: Any) -> Any:
        return sophia_optax.scale_by_sophia(gamma=1.0).init(params)

    def denominator(nu: jax.Array, corrected: Any) -> jax.Array:
        curvature = nu / corrected
        if change.square:
            curvature = jnp.sqrt(curvature)
        mean = jnp.mean(jnp.abs(curvature))
        if change.negative == "size":
            curvature = jnp.abs(curvature)
        elif change.negative == "rest":
            curvature = jnp.where(curvature > 0, curvature, jnp.inf)
        elif change.negative == "mean":
            curvature = jnp.where(curvature > 0, curvature, mean)
        return jnp.maximum(h.gamma * jnp.maximum(curvature, change.floor * mean), 1e-12)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        hessian_fn: Any = None,
        refresh: Any = None,
        **_: Any,
    ) -> Any:
        grads, nu, refreshes = updates, state.nu, state.refreshes
        if refresh:
            key = jax.random.fold_in(jax.random.key(0), state.count)
            power = 2 if change.square else 1
            nu = jax.tree.map(lambda n, e: h.b2 * n + (1 - h.b2) * e**power, nu, hessian_fn(key))
            refreshes += 1
        b1 = h.b1
        if change.last_b1 is not None:
            b1 += (change.last_b1 - b1) * jnp.minimum(state.count / STEPS, 1)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        ahead = mu
        if change.nesterov:
            ahead = jax.tree.map(lambda m, g: h.b1 * m + (1 - h.b1) * g, mu, grads)
        if change.correct_m:
            ahead = jax.tree.map(lambda m: m / (1 - h.b1 ** (state.count + 1)), mu)
        clip = jnp.clip((state.count + 1) / change.ramp, 0, 1) if change.ramp else 1.0
        ds = jax.tree.map(lambda n: denominator(n, 1 - h.b2**refreshes), nu)
        us = jax.tree.map(lambda m, d: jnp.clip(m / d, -clip, clip), ahead, ds)
        free = jax.tree.map(lambda m, d: jnp.sum(jnp.abs(m / d) < clip), ahead, ds)
        size = sum(leaf.size for leaf in jax.tree.leaves(us))
        rate = optax.tree.sum(free) / size if refresh else state.win_rate
        us = jax.tree.map(
            lambda u, p, decays, f: (
                -jnp.asarray(schedule(state.count)) * f * (u + h.weight_decay * decays * p)
            ),
            us,
            params,
            is_matrix(params),
            factor(params, state.count),
        )
        count = state.count + 1
        return us, state._replace(
            count=count,
            mu=mu,
            nu=nu,
            refreshes=refreshes,
            win_rate=jnp.float32(rate),
            gamma=jnp.float32(h.gamma),
        )

    return optax.GradientTransformationExtraArgs(init, update)


class ChangedRunner(Runner):
    """A runner for one change, with every kind's diagnostics at each refresh.

    Attributes:
      change: what is different.
      other: a kind of params whose warm-up is `other_warmup`, or None.
      watch: whether the kinds' diagnostics are kept.
    """

    def __init__(
        self,
        name: str,
        setting: Setting,
        change: Change = Change(),  # noqa: B008
        *,
        other: str | None = None,
        watch: bool = False,
    ):
        self.change, self.other, self.watch = change, other, watch
        row = ENTRANTS[name].row

        def extra_args(forward: Any, params: Any, batch: Any) -> dict[str, Any]:
            one = row.extra_args(forward, params, batch)["hessian_fn"]

            def mean(key: jax.Array) -> Any:
                keys = jax.random.split(key, change.probes)
                return jax.tree.map(lambda x: x.mean(0), jax.lax.map(one, keys))

            return {"hessian_fn": one if change.probes == 1 else mean}

        tiny = row.tiny
        if change.clip_norm is not None:
            tiny = replace(tiny, clip_norm=change.clip_norm)
        super().__init__(Optimizer(self.build, extra_args, tiny, row.large), setting)

    def build(self, h: Any, schedule: optax.Schedule) -> Any:
        """The changed optimizer; `schedule` has the warm-up of all params but `other`."""

        def factor(params: Any, step: Any) -> Any:
            if self.other is None:
                return jax.tree.map(lambda _: 1.0, params)
            # The schedule that the runner made is a partial of `cosine`.
            bound = schedule.keywords  # pyright: ignore[reportFunctionMemberAccess]
            opposite = jnp.where(bound["warmup"] < (SHORT + LONG) / 2, LONG, SHORT)
            ratio = cosine(step, **(bound | {"warmup": opposite})) / jnp.maximum(
                schedule(step), 1e-30
            )
            return jax.tree.map(
                lambda chosen: jnp.where(chosen, ratio, 1.0), in_kind(self.other, params)
            )

        return changed_sophia(h, schedule, self.change, factor)

    def due(self, step: int) -> bool:
        if step >= STEPS // 2:
            return step % self.change.late_interval == 0
        return super().due(step) or step < self.change.dense

    def diagnostics(self, opt_state: Any) -> dict[str, Any]:
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


class Study:
    """Runs what is asked for, or reads it from the journal."""

    def __init__(self, config: WarmupConfig, journal: Journal, corpus: data.Corpus):
        self.config, self.journal, self.corpus = config, journal, corpus
        self.setting = REGIMES["small"].setting
        self.runners: dict[str, Runs] = {}

    def runs(self, part: str, optimizer: str, name: str, make: Callable[[], Runner]) -> Runs:
        """One runner's runs; the runner is compiled when it is first needed."""
        key = f"{part}/{optimizer}/{name}"
        if key not in self.runners:
            names = {"part": part, "optimizer": optimizer, "name": name}
            self.runners[key] = Runs(self.journal, self.corpus, make, **names)
        return self.runners[key]

    def row(self, runs: Runs, point: Point, seed: int) -> dict[str, Any]:
        """A run at a point."""
        return runs(point, self.config.steps, seed, "tune")

    def what(self, optimizer: str) -> None:
        """The algorithm as it is, watched, at either warm-up."""
        make = functools.partial(ChangedRunner, optimizer, self.setting, watch=True)
        runs = self.runs("what", optimizer, "as it is", make)
        for warmup in (SHORT, LONG):
            self.row(runs, {**TUNED[optimizer], "warmup": warmup}, self.config.seeds[0])

    def where(self, optimizer: str, seed: int) -> None:
        """One kind's warm-up is short where the others' is long, or long where theirs is short."""
        for kind in (None, *KINDS):
            make = functools.partial(ChangedRunner, optimizer, self.setting, other=kind)
            runs = self.runs("where", optimizer, kind or "none", make)
            for warmup in (SHORT, LONG):
                self.row(runs, {**TUNED[optimizer], "warmup": warmup}, seed)

    def instead(self, optimizer: str, seed: int) -> None:
        """Every change at either warm-up and several learning rates."""
        for name in self.config.changes:
            change = CHANGES[name]
            make = functools.partial(ChangedRunner, optimizer, self.setting, change)
            runs = self.runs("instead", optimizer, name, make)
            for rate in RATES[optimizer]:
                for warmup in (SHORT, LONG):
                    point = {**TUNED[optimizer], "learning_rate": rate, "warmup": warmup}
                    self.row(runs, point, seed)


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
        few = {"optimizers": ("sophia_h",), "parts": ("what", "instead"), "changes": ("as it is",)}
        config = replace(config, seeds=(1000,), **few)
    origin = provenance("benchmarks.warmup")
    journal = Journal(None if config.quick else config.runs)
    study = Study(config, journal, data.load("stdlib"))
    for optimizer in config.optimizers:
        if "what" in config.parts:
            study.what(optimizer)
    for seed in config.seeds:
        for optimizer in config.optimizers:
            if "instead" in config.parts:
                study.instead(optimizer, seed)
            if "where" in config.parts:
                study.where(optimizer, seed)
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
