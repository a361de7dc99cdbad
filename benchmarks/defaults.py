"""Defaults that need a learning rate alone: Sophia's b1 and γ over small tasks of many kinds.

    python -m benchmarks.defaults [--quick] [--tasks ...]

A default has to do where nobody tunes it. So each candidate, a b1 with a γ or a win-rate target, is
fixed for all tasks, and on each task only its learning rate is tuned: three tries on a ladder of
factors of 2, the same for all, except that Sophia's starts at half of AdamW's. Tuning has a seed
and a split of its own. AdamW has b2 = 0.95 on language models, and elsewhere the better of 0.95 and
0.999 by the same tuning. Sophia-H does not run on language models, where `lm_race.py` tuned it. Of
each Sophia that candidate is chosen which is best on the task that it is worst at, by its tuning
loss over AdamW's. It, the one with the paper's b1 and γ, and AdamW then run on other seeds and are
judged on other data.

The tasks, each a few seconds on one core:

lm_*       the trainer's model on bytes at two widths, and the smaller at two batch sizes
lm_tokens  the larger one on byte-pair tokens, 8,192 of them
classes    a vision transformer on the digits
vae        a variational autoencoder of the digits. Its loss is a sum over the pixels of an image,
           so one prediction is an image and not a pixel: `event_ndim` of the likelihood is 1.
pinn       Poisson's equation on a square. Its loss is a least square of the residual.

Runs are appended to `results/defaults.jsonl` as they end, and what is there is not run again;
`results/defaults.json` has the tables and `defaults.png` the plot.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from matplotlib.figure import Figure

import sophia_optax
from benchmarks.lib.journal import Journal
from benchmarks.lib.provenance import RESULTS, provenance
from benchmarks.lib.sweep import TUNING_SEED, Runs, Workload, mean_win_rate
from examples import vision
from examples.lm import data
from examples.lm.config import Hyperparameters, ModelConfig
from examples.lm.optimizers import OPTIMIZERS, Curvature, Optimizer, build
from examples.lm.train import Trainer
from examples.vision import Batch, Params

STARTS = {"adamw": 5e-3, "sophia_g": 2.5e-3, "sophia_h": 2.5e-3}

# --- Candidates -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """Hyperparameters that hold for all tasks.

    Attributes:
      optimizer: a name in `examples.lm.optimizers.OPTIMIZERS`.
      fixed: those that differ from one candidate to the next.
      weighted: whether its win-rate target weighs coordinates by their momentum.
    """

    optimizer: str
    fixed: Mapping[str, Any]
    weighted: bool = False


CANDIDATES: dict[str, Candidate] = {
    "adamw_0.95": Candidate("adamw", {"b1": 0.9, "b2": 0.95}),
    "adamw_0.999": Candidate("adamw", {"b1": 0.9, "b2": 0.999}),
    "sophia_g_paper": Candidate("sophia_g", {"b1": 0.965, "gamma": 0.05}),
    "sophia_g_0.2": Candidate("sophia_g", {"b1": 0.9, "gamma": 0.2}),
    "sophia_g_target_0.5": Candidate("sophia_g", {"b1": 0.9, "win_rate": 0.5}),
    "sophia_g_target_0.7": Candidate("sophia_g", {"b1": 0.9, "win_rate": 0.7}),
    "sophia_g_weighted_0.7": Candidate("sophia_g", {"b1": 0.9, "win_rate": 0.7}, weighted=True),
    "sophia_g_weighted_0.8": Candidate("sophia_g", {"b1": 0.9, "win_rate": 0.8}, weighted=True),
    "sophia_h_paper": Candidate("sophia_h", {"b1": 0.965, "gamma": 0.01}),
    "sophia_h_0.02": Candidate("sophia_h", {"b1": 0.9, "gamma": 0.02}),
}


def row_of(candidate: Candidate, clip_norm: float = 1.0) -> Optimizer:
    """The trainer's row with a candidate's hyperparameters, and Optax's for what is not set."""
    h = Hyperparameters(
        STARTS[candidate.optimizer], b2=0.99, weight_decay=1e-4, warmup=0.1, clip_norm=clip_norm
    )
    h = replace(h, **candidate.fixed)
    row = OPTIMIZERS[candidate.optimizer]
    if candidate.weighted:
        target = functools.partial(sophia_optax.win_rate_target, weighted=True)
        row = replace(row, build=functools.partial(row.build, target=target))
    return replace(row, tiny=h)


NOT_ON_TEXT = ("adamw_0.999", "sophia_h_paper", "sophia_h_0.02")

# --- Tasks ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FunctionTask:
    """What `examples.vision.train` solves.

    Attributes:
      make: the task.
      splits: "train", "tune" and "test".
      steps: of a run.
      clip_norm: the largest global norm of a gradient.
    """

    make: Callable[[], vision.Task]
    splits: Callable[[], dict[str, Batch]]
    steps: int = 200
    clip_norm: float = 1.0

    def num_params(self) -> int:
        """How many numbers are trained."""
        return count(jax.eval_shape(self.make().init, 0))

    def runner(self, journal: Journal, candidate: Candidate, steps: int) -> "Runner":
        """The runs of candidates that differ in numbers alone, which share one compilation."""
        run = self.compiled(candidate, steps)

        def runs(
            names: dict[str, str], point: dict[str, float], seed: int, split: str
        ) -> dict[str, Any]:
            def train() -> dict[str, Any]:
                start = time.perf_counter()
                found = jax.block_until_ready(run(point, seed))
                seconds = time.perf_counter() - start
                win_rates = found.get("win_rate", jnp.zeros(0)).reshape(-1)[::10]
                loss = float(found["tune" if split == "tune" else "test"]["loss"])
                return {"loss": loss, "seconds": seconds, "win_rates": win_rates.tolist()}

            key = {**names, "steps": steps, "seed": seed, "split": split, **point}
            return journal.get(key, train)

        return runs

    def compiled(
        self, candidate: Candidate, steps: int
    ) -> Callable[[dict[str, float], int], dict[str, Any]]:
        """A whole run as one jitted function of a point and a seed."""
        row, task, splits = row_of(candidate, self.clip_norm), self.make(), self.splits()
        estimators: dict[str, Any] = {
            "sophia_g": vision.gauss_newton,
            "sophia_h": vision.hutchinson,
        }
        estimator = estimators.get(candidate.optimizer)
        row = replace(row, curvature=Curvature(estimator) if estimator else None)

        @jax.jit
        def run(point: dict[str, Any], seed: Any) -> dict[str, Any]:
            tx, _ = build(row, replace(row.tiny, **point), steps)
            return vision.train(task, tx, estimator, splits, steps, seed)

        return run


Runner = Callable[[dict[str, str], dict[str, float], int, str], dict[str, Any]]
"""(names, point, seed, split) to a row of the journal."""


@dataclass(frozen=True, eq=False)
class TextTask:
    """What the trainer of `examples.lm` solves.

    Attributes:
      workload: model and batches.
      tokenizer: of the text.
      steps: of a run.
    """

    workload: Workload
    tokenizer: str = "bytes"
    steps: int = 150

    def num_params(self) -> int:
        """How many numbers are trained."""
        return count(Trainer(self.workload.run("adamw")).abstract_state.params)

    def runner(self, journal: Journal, candidate: Candidate, steps: int) -> Runner:
        """The runs of candidates that differ in numbers alone, which share one compilation."""
        sweep = Runs(journal, corpus(self.tokenizer), self.workload.run(row_of(candidate)))

        def runs(
            names: dict[str, str], point: dict[str, float], seed: int, split: str
        ) -> dict[str, Any]:
            sweep.names = names
            return sweep(point, steps, seed, "tune" if split == "tune" else "validation")

        return runs


@functools.cache
def corpus(tokenizer: str) -> data.Corpus:
    """The sources of Python's library."""
    return data.load("stdlib", tokenizer)


def count(tree: Any) -> int:
    """How many numbers a tree holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


LATENT, HIDDEN = 8, 64


class Autoencoder(nnx.Module):
    """An image's 64 pixels to the mean and log variance of a code, and a code to 64 logits."""

    def __init__(self, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, rngs=rngs)
        self.encode, self.code = linear(64, HIDDEN), linear(HIDDEN, 2 * LATENT)
        self.decode, self.pixels = linear(LATENT, HIDDEN), linear(HIDDEN, 64)

    def __call__(
        self, images_Bx64: jax.Array, noise_BxZ: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        mean, log_variance = jnp.split(self.code(nnx.gelu(self.encode(images_Bx64))), 2, axis=-1)
        code = mean + jnp.exp(0.5 * log_variance) * noise_BxZ
        return self.pixels(nnx.gelu(self.decode(code))), mean, log_variance


def numbered_digits() -> dict[str, Batch]:
    """The digits, each with its number, from which a batch's noise is drawn."""
    splits = vision.digits()
    return {
        name: {**split, "number": jnp.arange(len(split["labels"]), dtype=jnp.uint32)}
        for name, split in splits.items()
    }


def vae() -> vision.Task:
    """The negative evidence lower bound in nats an image: a sum over pixels, a mean over images."""
    init, model = vision.functional(Autoencoder)

    def forward(params: Params, batch: Batch) -> tuple[jax.Array, ...]:
        # The same noise for the gradient and the curvature of a batch, and another in the next.
        places = jnp.arange(1, len(batch["number"]) + 1, dtype=jnp.uint32)
        key = jax.random.key(jnp.sum(batch["number"] * places))
        images = batch["images"].reshape(-1, 64)
        return model(params)(images, jax.random.normal(key, (len(images), LATENT)))

    def loss(params: Params, batch: Batch) -> jax.Array:
        logits, mean, log_variance = forward(params, batch)
        images = batch["images"].reshape(-1, 64)
        reconstruction = optax.sigmoid_binary_cross_entropy(logits, images).sum(axis=-1)
        divergence = 0.5 * (jnp.exp(log_variance) + mean**2 - 1 - log_variance).sum(axis=-1)
        return jnp.mean(reconstruction + divergence)

    return vision.Task(
        init,
        loss,
        lambda params, batch: forward(params, batch)[0],
        replace(sophia_optax.bernoulli, event_ndim=1),
        lambda params, batch: {"loss": loss(params, batch)},
    )


class Field(nnx.Module):
    """A point of the unit square to a number that is zero on its border."""

    def __init__(self, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, rngs=rngs)
        self.first, self.second, self.last = linear(2, 32), linear(32, 32), linear(32, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        border = 16 * jnp.prod(x * (1 - x))
        return border * self.last(jnp.tanh(self.second(jnp.tanh(self.first(x)))))[0]


def points() -> dict[str, Batch]:
    """Points of the unit square, and what -Δu is there for u = sin(πx) sin(2πy)."""
    draws = np.random.default_rng(0).uniform(size=(1800, 2)).astype(np.float32)
    forces = 5 * np.pi**2 * np.sin(np.pi * draws[:, 0]) * np.sin(2 * np.pi * draws[:, 1])
    rows = {"train": slice(0, 1000), "tune": slice(1000, 1400), "test": slice(1400, None)}
    return {
        name: {"points": jnp.asarray(draws[i]), "labels": jnp.asarray(forces[i])}
        for name, i in rows.items()
    }


def pinn() -> vision.Task:
    """Half the mean square of the residual of -Δu = f, which is of order ten."""
    init, model = vision.functional(Field)

    def laplacian(params: Params, batch: Batch) -> jax.Array:
        field_of = model(params)
        return jax.vmap(lambda x: jnp.trace(jax.hessian(field_of)(x)))(batch["points"]) / 10

    def loss(params: Params, batch: Batch) -> jax.Array:
        return 0.5 * jnp.mean(jnp.square(laplacian(params, batch) + batch["labels"] / 10))

    return vision.Task(
        init,
        loss,
        laplacian,
        sophia_optax.gaussian,
        lambda params, batch: {"loss": loss(params, batch)},
    )


def text(width: int, batch_size: int, curvature_batch: int, tokenizer: str = "bytes") -> TextTask:
    """Two blocks of a width, on windows of 32 tokens."""
    model = ModelConfig(layers=2, width=width, heads=4, context=32, init_scale=0.06)
    vocab_size = 256 if tokenizer == "bytes" else int(tokenizer.removeprefix("bpe:"))
    workload = Workload(model, batch_size, curvature_batch, vocab_size=vocab_size)
    return TextTask(workload, tokenizer)


NO_CLIPPING = 1e6
TASKS: dict[str, TextTask | FunctionTask] = {
    "lm_32_8": text(32, 8, 4),
    "lm_64_8": text(64, 8, 4),
    "lm_32_32": text(32, 32, 8),
    "lm_tokens": text(64, 32, 8, "bpe:8192"),
    "classes": FunctionTask(vision.classes, vision.digits),
    "vae": FunctionTask(vae, numbered_digits, clip_norm=NO_CLIPPING),
    "pinn": FunctionTask(pinn, points, steps=400, clip_norm=NO_CLIPPING),
}

# --- The study ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DefaultsConfig:
    """What to run.

    Attributes:
      tasks: names in `TASKS`.
      candidates: names in `CANDIDATES`.
      seeds: of the runs that are reported; tuning uses another.
      quick: a few steps of a few, to see that it runs; writes to runs/.
      runs: the file of finished runs.
      out: the folder for the results.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    candidates: tuple[str, ...] = tuple(CANDIDATES)
    seeds: tuple[int, ...] = (0, 1, 2)
    quick: bool = False
    runs: Path = RESULTS / "defaults.jsonl"
    out: Path = RESULTS


QUICK: dict[str, Any] = {
    "tasks": ("vae", "pinn"),
    "candidates": ("adamw_0.999", "sophia_g_paper", "sophia_g_target_0.5"),
    "seeds": (0,),
    "out": Path("runs"),
}


def finite(loss: float) -> float:
    """A loss, infinite where the run diverged."""
    return math.inf if math.isnan(loss) else loss


def tuned(start: float, loss_of: Callable[[float], float]) -> dict[str, Any]:
    """Three tries of a learning rate: `start`, twice that, and the next rung beyond the better.

    Returns:
      The best learning rate and loss, and whether it is the last rung that was tried on its side.
    """
    tried = {rate: finite(loss_of(rate)) for rate in (start, 2 * start)}
    beyond = start / 2 if tried[start] <= tried[2 * start] else 4 * start
    tried[beyond] = finite(loss_of(beyond))
    best = min(tried, key=lambda rate: tried[rate])
    return {"learning_rate": best, "loss": tried[best], "edge": best == beyond}


def optimizer_of(candidate: str) -> str:
    """The optimizer that a candidate is one of."""
    return CANDIDATES[candidate].optimizer


def over_adamw(tuning: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    """Each candidate's tuning loss on a task over that of AdamW with the better b2."""
    adamw = min(row["loss"] for name, row in tuning.items() if optimizer_of(name) == "adamw")
    return {name: row["loss"] / adamw for name, row in tuning.items()}


def chosen(tunings: Mapping[str, Mapping[str, dict[str, Any]]], optimizer: str) -> str:
    """The candidate of an optimizer whose largest loss over AdamW's is the lowest.

    Args:
      tunings: by task and candidate, what `tuned` returned.
      optimizer: whose candidates are compared.
    """
    worst: dict[str, float] = {}
    for tuning in tunings.values():
        for name, ratio in over_adamw(tuning).items():
            if optimizer_of(name) == optimizer:
                worst[name] = max(ratio, worst.get(name, 0.0))
    return min(worst, key=lambda name: worst[name])


def reported(tunings: Mapping[str, Mapping[str, dict[str, Any]]], task: str) -> list[str]:
    """Who runs on the reported seeds of a task: AdamW, the paper's and the chosen candidates."""
    own = [name for name in tunings[task] if optimizer_of(name) == "adamw"]
    adamw = min(own, key=lambda name: tunings[task][name]["loss"])
    sophias = dict.fromkeys(
        name
        for optimizer in dict.fromkeys(map(optimizer_of, tunings[task]))
        if optimizer != "adamw"
        for name in (f"{optimizer}_paper", chosen(tunings, optimizer))
    )
    return [adamw, *sophias]


def study(config: DefaultsConfig, journal: Journal) -> dict[str, Any]:
    """Runs what the journal lacks.

    Returns:
      By task: the tuning of each candidate and the reported runs.
    """
    runners: dict[tuple[Any, ...], Runner] = {}

    def run(task: str, name: str, rate: float, seed: int, split: str) -> dict[str, Any]:
        candidate = CANDIDATES[name]
        program = (task, candidate.optimizer, candidate.weighted, *candidate.fixed)
        if program not in runners:
            steps = 20 if config.quick else TASKS[task].steps
            runners[program] = TASKS[task].runner(journal, candidate, steps)
        point = {"learning_rate": rate, **candidate.fixed}
        return runners[program]({"task": task, "candidate": name}, point, seed, split)

    tunings: dict[str, dict[str, dict[str, Any]]] = {}
    for task in config.tasks:
        tunings[task] = {
            name: tuned(
                STARTS[optimizer_of(name)],
                lambda rate, t=task, n=name: run(t, n, rate, TUNING_SEED, "tune")["loss"],
            )
            for name in config.candidates
            if not (isinstance(TASKS[task], TextTask) and name in NOT_ON_TEXT)
        }
    results: dict[str, Any] = {}
    for task, tuning in tunings.items():
        rows = {
            name: [
                run(task, name, tuning[name]["learning_rate"], seed, "held out")
                for seed in config.seeds
            ]
            for name in reported(tunings, task)
        }
        results[task] = {
            "num_params": TASKS[task].num_params(),
            "steps": TASKS[task].steps,
            "tuning": tuning,
            "losses": {name: [row["loss"] for row in found] for name, found in rows.items()},
            "win_rates": {
                name: rate
                for name, found in rows.items()
                if (rate := mean_win_rate(found)) is not None
            },
        }
    return results


def plot(results: dict[str, Any]) -> Figure:
    """For every task, each reported seed's loss over AdamW's mean."""
    columns = 3
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(12, 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in panels[len(results) :]:
        unused.remove()
    for axes, (task, row) in zip(panels, results.items(), strict=False):
        adamw = np.mean(next(iter(row["losses"].values())))
        for place, losses in enumerate(row["losses"].values()):
            axes.plot(np.array(losses) / adamw, [place] * len(losses), "o", alpha=0.6)
        axes.axvline(1, color="black", linewidth=0.5)
        axes.set(title=task, yticks=range(len(row["losses"])))
        axes.set_yticklabels(list(row["losses"]))
        axes.set_ylim(len(row["losses"]) - 0.5, -0.5)
        if max(map(max, row["losses"].values())) > 3 * adamw:
            axes.set_xscale("log")
    figure.supxlabel("held-out loss over AdamW's mean, a dot a seed")
    return figure


def main(config: DefaultsConfig) -> None:
    """Runs what is missing and writes the tables and the plot."""
    if config.quick:
        config = replace(config, **QUICK)
    origin = provenance("benchmarks.defaults")
    journal = Journal(None if config.quick else config.runs)
    results = study(config, journal)
    optimizers = [o for o in STARTS if o != "adamw"]
    tunings = {task: row["tuning"] for task, row in results.items()}
    whole = {
        **origin,
        "seeds": config.seeds,
        "tries": 3,
        "candidates": {name: dataclasses.asdict(CANDIDATES[name]) for name in config.candidates},
        "chosen": {
            o: chosen(tunings, o) for o in optimizers if o in map(optimizer_of, config.candidates)
        },
        "results": results,
    }
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "defaults.json").write_text(json.dumps(whole, indent=1) + "\n")
    plot(results).savefig(config.out / "defaults.png", dpi=120)


if __name__ == "__main__":
    main(tyro.cli(DefaultsConfig))
