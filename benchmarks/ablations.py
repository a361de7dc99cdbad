"""What each part of Sophia-G in the eigenbasis is worth, and how exact its learning rate must be.

    python -m benchmarks.ablations [--quick] [--parts changes rates]

Both parts are in the small regime of `lm_race`, at the points that the race tuned, on its seeds and
its `validation` split. The race's own runs are what they are compared with:

* changes: Sophia-G in the eigenbasis with one thing changed, at the length that it was tuned for. A
  change that alters the length of all steps also runs at smaller learning rates.
* rates: five optimizers at multiples of their tuned learning rates, at half of that length.

Runs are kept as those of `lm_race` are, in `results/ablations.jsonl`; `results/ablations.json` has
the tables and `ablations.png` the plot.
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import optax
import tyro

import sophia_optax
from benchmarks.entrants import ENTRANTS
from benchmarks.lib.journal import Journal
from benchmarks.lib.plots import line_over_seeds
from benchmarks.lib.provenance import RESULTS, provenance
from benchmarks.lib.sweep import Runs
from benchmarks.lm_race import QUICK, REGIMES, raced
from benchmarks.tables.formats import NAMES
from examples.lm import data
from examples.lm.model import parameter_count
from examples.lm.optimizers import MUON_MATRICES, Optimizer, matrix_axes, sophia
from examples.lm.tune import Point

REGIME = REGIMES["small"]
CHANGED = "sophia_g_eigenbasis"
RATED = ("adamw", CHANGED, "soap", "muon_adamw", "sophia_g")
FACTORS = (0.25, 0.5, 2.0, 4.0)


def tuned(entrant: str) -> Point:
    """The point that the race found for an entrant."""
    return raced("small", entrant)["point"]


# --- what is changed ------------------------------------------------------------------------------


def turned(matrices: str, embedding: str | None) -> Any:
    """The sides that have a basis, in the blocks and in the embeddings (None: not turned)."""

    def axes(path: Any, own: Any) -> sophia_optax.MatrixAxes | None:
        name = next(key.key for key in reversed(path) if hasattr(key, "key"))
        turn = matrices if name in MUON_MATRICES else embedding
        return None if own is None or turn is None else own._replace(turn=turn)

    def numbers(params: Any) -> Any:
        own = matrix_axes(params)

        def is_leaf(leaf: Any) -> bool:
            return leaf is None or isinstance(leaf, sophia_optax.MatrixAxes)

        return jax.tree_util.tree_map_with_path(axes, own, is_leaf=is_leaf)

    return numbers


class Recorder:
    """The params' own axes as `Coordinates`; it keeps what an estimator turns into them."""

    def __init__(self) -> None:
        self.turned: Any = None

    def turn(self, tree: Any) -> Any:
        """Returns the tree, and keeps it."""
        self.turned = tree
        return tree

    def back(self, tree: Any) -> Any:
        """Returns the tree."""
        return tree


def with_sampled_basis(
    tx: optax.GradientTransformationExtraArgs, basis: Mapping[str, Any]
) -> optax.GradientTransformationExtraArgs:
    """Averages the factors from sampled gradients instead of the gradients, and turns every step.

    A sample is the gradient that Gauss-Newton-Bartlett squares: of labels drawn from the model, on
    the examples of the curvature. It is drawn anew in each step.

    Args:
      tx: `sophia_g` in the eigenbasis.
      basis: the keywords of `in_eigenbasis` that it was made with.

    Returns:
      A transformation with the state of `tx`.
    """
    keep = optax.GradientTransformation(lambda params: (), lambda u, state, params=None: (u, state))
    turn = sophia_optax.in_eigenbasis(keep, **basis)

    def update(updates: Any, state: Any, params: Any, *, hessian_fn: Any, **extra_args: Any) -> Any:
        old, *others = state
        recorder = Recorder()
        hessian_fn(jax.random.fold_in(jax.random.key(1), old.count), coordinates=recorder)
        # What it keeps is Sophia's state, with the momenta turned into the new bases.
        _, turned = turn.update(recorder.turned, old, params, refresh_basis=True)
        state = (turned._replace(count=old.count), *others)
        options = {"hessian_fn": hessian_fn, "refresh_basis": False, **extra_args}
        updates, (new, *others) = tx.update(updates, state, params, **options)
        return updates, (new._replace(bases=turned.bases), *others)

    return optax.GradientTransformationExtraArgs(tx.init, update)


@dataclass(frozen=True)
class Change:
    """One difference from the raced optimizer.

    Attributes:
      point: hyperparameters that differ from the tuned ones.
      basis: keywords of `in_eigenbasis` that differ.
      options: keywords of `sophia_g`.
      sampled: whether the basis is averaged from sampled gradients.
      slower: also run at the learning rate times each of these.
    """

    point: Mapping[str, float] = field(default_factory=dict)
    basis: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    sampled: bool = False
    slower: tuple[float, ...] = ()

    def row(self) -> Optimizer:
        """The raced row with this change."""

        def build(
            h: Any, schedule: optax.Schedule, eigenbasis: Mapping[str, Any]
        ) -> optax.GradientTransformation:
            basis = {**eigenbasis, **self.basis}
            make = functools.partial(sophia_optax.sophia_g, eigenbasis=basis, **self.options)
            tx = sophia(make, h, schedule)
            return with_sampled_basis(tx, basis) if self.sampled else tx

        return replace(ENTRANTS[CHANGED], build=build)


CHANGES = {
    "f = 10": Change(point={"basis_interval": 10}),
    "f = 100": Change(point={"basis_interval": 100}),
    "blocks of 128": Change(basis={"block_size": 128}),
    "blocks of 64": Change(basis={"block_size": 64}),
    "blocks of 32": Change(basis={"block_size": 32}),
    "basis from samples": Change(sampled=True),
    "inputs only": Change(basis={"dimension_numbers": turned("left", "right")}),
    "outputs only": Change(basis={"dimension_numbers": turned("right", "right")}),
    "no Nesterov": Change(options={"nesterov": False}),
    # γ |h| is below ε everywhere, so every coordinate that is not zero takes a step of η.
    "no curvature": Change(point={"gamma": 1e-9}, slower=(0.25,)),
    "no clip": Change(options={"clip_threshold": None}, slower=(0.25,)),
    "embeddings not turned": Change(basis={"dimension_numbers": turned("both", None)}),
}


# --- the experiments ------------------------------------------------------------------------------


@dataclass(frozen=True)
class AblationConfig:
    """What to run.

    Attributes:
      parts: of "changes" and "rates".
      changes: names in `CHANGES`.
      entrants: names in `ENTRANTS`, for the learning rates.
      seeds: of the runs.
      quick: a few steps of each, to see that it runs; writes no results.
      runs: the file of finished runs.
    """

    parts: tuple[str, ...] = ("changes", "rates")
    changes: tuple[str, ...] = tuple(CHANGES)
    entrants: tuple[str, ...] = RATED
    seeds: tuple[int, ...] = REGIME.seeds
    quick: bool = False
    runs: Path = RESULTS / "ablations.jsonl"

    def steps(self, part: str) -> int:
        """Of every run of a part."""
        return 4 if self.quick else REGIME.steps // (2 if part == "rates" else 1)


class Study:
    """Runs what is asked for, or reads it from the journal."""

    def __init__(self, config: AblationConfig, journal: Journal, corpus: data.Corpus):
        self.config, self.journal, self.corpus = config, journal, corpus
        self.sweeps: dict[str, Runs] = {}

    def runs(self, part: str, name: str, row: Optimizer) -> Runs:
        """The runs of one row; they share a compilation."""
        key = f"{part}/{name}"
        if key not in self.sweeps:
            run = (QUICK if self.config.quick else REGIME).workload.run(row)
            self.sweeps[key] = Runs(self.journal, self.corpus, run, part=part, name=name)
        return self.sweeps[key]

    def change(self, name: str, seed: int) -> None:
        """The raced optimizer with one change, at each of its learning rates."""
        change, best = CHANGES[name], tuned(CHANGED)
        for factor in (1.0, *change.slower):
            rate = factor * best["learning_rate"]
            point = {**best, **change.point, "learning_rate": rate}
            runs = self.runs("changes", name, change.row())
            runs(point, self.config.steps("changes"), seed, "validation")

    def vary_rate(self, entrant: str, seed: int) -> None:
        """An entrant at multiples of its learning rates, Muon's own included."""
        best = tuned(entrant)
        for factor in FACTORS:
            scaled = {k: factor * v for k, v in best.items() if k.endswith("learning_rate")}
            runs = self.runs("rates", entrant, ENTRANTS[entrant])
            runs({**best, **scaled}, self.config.steps("rates"), seed, "validation")


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Losses of each part and name by the learning rate over the tuned one and by seed.

    Args:
      rows: the journal's.

    Returns:
      A loss is None where the run diverged: it is above a uniform guess of the byte, or NaN.
    """
    tables: dict[str, Any] = {}
    for row in rows:
        key = row["key"]
        best = tuned(CHANGED if key["part"] == "changes" else key["name"])
        factor = f"{key['learning_rate'] / best['learning_rate']:g}"
        table = tables.setdefault(key["part"], {}).setdefault(key["name"], {})
        learned = row["loss"] < math.log(256)
        table.setdefault(factor, {})[key["seed"]] = row["loss"] if learned else None
    return tables


def with_race(rates: dict[str, Any], steps: int) -> dict[str, Any]:
    """Adds the race's runs at the tuned rates, and keeps the seeds that have run at all rates."""
    found = {}
    for name, table in rates.items():
        whole = {**table, "1": dict(enumerate(raced("small", name)["losses"][str(steps)]))}
        common = sorted(set.intersection(*(set(losses) for losses in whole.values())))
        if common and len(whole) > len(FACTORS):
            found[name] = {
                factor: {seed: whole[factor][seed] for seed in common}
                for factor in sorted(whole, key=float)
            }
    return found


def plot(rates: dict[str, Any], path: Path) -> None:
    """Mean loss and range over seeds by the learning rate, over each entrant's tuned one."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for name, found in rates.items():
        x = [float(factor) for factor in found]
        losses = [list(by_seed.values()) for by_seed in found.values()]
        line_over_seeds(axes, x, losses, NAMES[name])
    axes.set_xscale("log", base=2)
    axes.set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    axes.set(xlabel="learning rate over the tuned one", ylabel="validation loss, nats per byte")
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(config: AblationConfig) -> None:
    """Runs what is missing and writes the tables and the plot."""
    if config.quick:
        few = {"changes": ("outputs only",), "entrants": ("adamw",)}
        config = replace(config, seeds=(0,), **few)
    origin = provenance("benchmarks.ablations")
    journal = Journal(None if config.quick else config.runs)
    study = Study(config, journal, data.load("stdlib"))
    for seed in config.seeds:
        for name in config.changes if "changes" in config.parts else ():
            study.change(name, seed)
        for entrant in config.entrants if "rates" in config.parts else ():
            study.vary_rate(entrant, seed)
    if config.quick:
        return
    tables = summarize(journal.rows)
    steps = {part: config.steps(part) for part in tables}
    result = {
        **origin,
        "parameters": parameter_count(REGIME.workload.run("adamw").model),
        "steps": steps,
        "results": tables,
    }
    if "changes" in tables:
        result["raced"] = raced("small", CHANGED)["losses"][str(steps["changes"])]
    if "rates" in tables:
        tables["rates"] = with_race(tables["rates"], steps["rates"])
        plot(tables["rates"], RESULTS / "ablations.png")
    (RESULTS / "ablations.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(AblationConfig))
