"""How far the curvature estimators are from the exact diagonal, and what they cost.

    python -m benchmarks.estimator_quality            # about ten minutes of one CPU core
    python -m benchmarks.estimator_quality --quick    # under two minutes of it; writes to runs/

A small transformer is trained on bytes with Sophia-G. At its last params, on one batch that it has
not seen, the diagonals of the Hessian and of the Gauss-Newton matrix are computed exactly, one
direction for each parameter. Hutchinson's estimator is held against the first and
Gauss-Newton-Bartlett (GNB) against the second. Errors are given for each kind of parameter:

    relative   ‖ĥ - h‖ / ‖h‖
    cosine     of the angle between ĥ and h
    rank       Spearman's correlation of ĥ and h
    flips      the share of coordinates that one of ĥ and h clips and the other does not
    win_rate   the share of coordinates that ĥ does not clip

A coordinate is clipped where |m| ≥ γ h, negative h included. m is the run's momentum, and γ is such
that the exact diagonal clips half of all coordinates, one γ for each of the two diagonals.

Costs are in gradients of the mean loss on the whole batch, by XLA's count of FLOPs.
"""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from jax.flatten_util import ravel_pytree

from benchmarks.lib.provenance import RESULTS, provenance
from benchmarks.lib.sweep import Workload
from examples.lm import data, mesh
from examples.lm.config import MODELS
from examples.lm.optimizers import Forward, gauss_newton, hutchinson, map_by_name
from examples.lm.train import Trainer

Row = dict[str, Any]

KINDS = (
    "embedding, frequent", "embedding, common", "embedding, rare", "positions",
    "attention q, k", "attention v", "attention out", "MLP", "norms",
)  # fmt: skip
# Of the params that are of one kind whole; the embedding and the fused query, key, value are not.
KIND_BY_NAME = {
    "positions": "positions",
    **dict.fromkeys(("out", "out_bias"), "attention out"),
    **dict.fromkeys(("up", "up_bias", "down", "down_bias"), "MLP"),
    **dict.fromkeys(("scale", "bias"), "norms"),
}
FREQUENT, RARE = 1e-2, 1e-4  # of the training text's bytes: those above and those below
WIN_RATE = 0.5
B2 = 0.99
EPS = 1e-12
DIRECTIONS = 8  # at a time
INTERVAL = 10  # steps from one refresh to the next
# As fast a program, compiled in half the time. JAX_DISABLE_MOST_OPTIMIZATIONS asks for less still.
COMPILER = {"xla_backend_optimization_level": 1}
if jax.config.read("jax_disable_most_optimizations"):
    COMPILER = {}


@dataclass(frozen=True)
class QualityConfig:
    """What is measured.

    Attributes:
      layers: of the transformer.
      width: of the transformer, which has four heads.
      context: bytes in a sequence.
      batch_size: sequences in a step, and in the batch that the exact diagonals are of.
      probes: how many probes, or samples, an estimate averages over.
      shares: the part of the batch that an estimate sees, as 1 / these.
      refreshes: how many estimates the optimizer's average holds; the run has the last of these.
      chains: independent averages, which errors are means over.
      seed: of everything.
      quick: a smaller setting, to see that it runs; writes to runs/.
    """

    layers: int = 2
    width: int = 24
    context: int = 64
    batch_size: int = 8
    probes: tuple[int, ...] = (1, 2, 4, 8, 16)
    shares: tuple[int, ...] = (1, 2, 4, 8)
    refreshes: tuple[int, ...] = (1, 10, 100)
    chains: int = 8
    seed: int = 0
    quick: bool = False


QUICK = {
    "layers": 1, "width": 8, "context": 16, "batch_size": 4, "probes": (1, 4), "shares": (1,),
    "refreshes": (1, 10), "chains": 4,
}  # fmt: skip


# --- the estimators -------------------------------------------------------------------------------


def all_at_once(
    forward: Forward, params: Any, batch: jax.Array, probes: int, **options: Any
) -> Any:
    """Sophia-H's, all probes at once."""
    return hutchinson(forward, params, batch, num_probes=probes, probe_chunk=probes, **options)


def sampled(forward: Forward, params: Any, batch: Any, probes: int, **options: Any) -> Any:
    """Sophia-G's."""
    return gauss_newton(forward, params, batch, num_samples=probes, **options)


ESTIMATORS: dict[str, Callable[..., Any]] = {
    "Hutchinson, signs": functools.partial(all_at_once, distribution="rademacher"),
    "Hutchinson, normal": functools.partial(all_at_once, distribution="gaussian"),
    "GNB, labels": functools.partial(sampled, sampling="labels"),
    "GNB, curvature propagation": functools.partial(sampled, sampling="curvature_propagation"),
}
TARGETS = {
    name: "hessian" if name.startswith("Hutchinson") else "gauss_newton" for name in ESTIMATORS
}


Sampler: TypeAlias = Callable[[jax.Array, Any, Any], jax.Array]


def sampler(
    hessian_fn: Callable[[Any, jax.Array], Callable[[jax.Array], Any]],
    rebuild: Callable[[jax.Array], Any],
    size: int,
) -> Sampler:
    """Compiles independent estimates, each on a sub-batch that is drawn anew.

    Args:
      hessian_fn: from params and a batch to an estimator.
      rebuild: from d numbers to params.
      size: how many examples of its batch an estimate sees.

    Returns:
      A function from keys `[n]`, batches `[n, batch_size, ...]` and params `[n, d]` to estimates
      `[n, d]`.
    """

    def estimate(argument: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        key, batch, vector = argument
        for_rows, for_probes = jax.random.split(key)
        rows = jax.random.permutation(for_rows, batch.shape[0])[:size]
        return ravel_pytree(hessian_fn(rebuild(vector), batch[rows])(for_probes))[0]

    return jax.jit(
        lambda keys, batches, vectors: jax.lax.map(estimate, (keys, batches, vectors)),
        compiler_options=COMPILER,
    )


def averages(estimates: np.ndarray, count: int, b2: float = B2) -> np.ndarray:
    """The optimizer's average of `count` estimates, corrected for its start at zero.

    Args:
      estimates: `[chains, at least count, d]`, the oldest first.
      count: how many refreshes there have been.
      b2: decay of the average.

    Returns:
      `[chains, d]`.
    """
    weights = b2 ** np.arange(count - 1, -1, -1.0)
    return np.einsum("n,cnd->cd", weights / weights.sum(), estimates[:, :count])


# --- the exact diagonals --------------------------------------------------------------------------


def exact_diagonals(
    outputs_fn: Callable[[Any], jax.Array], labels: jax.Array, params: Any
) -> dict[str, np.ndarray]:
    """The diagonals that the estimators aim at, of a mean cross-entropy.

    The Hessian's by a product with each unit vector, forward over reverse. The Gauss-Newton
    matrix's from the derivative of the logits along each, z': the mean over the predictions of the
    variance of z' under the softmax.

    Args:
      outputs_fn: from params to logits `[..., V]`.
      labels: integers `[...]`.
      params: a tree with d numbers.

    Returns:
      "hessian" and "gauss_newton", `[d]`.
    """
    vector, rebuild = ravel_pytree(params)

    def loss(v: jax.Array) -> jax.Array:
        logits = outputs_fn(rebuild(v))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def of_hessian(index: jax.Array) -> jax.Array:
        unit = jax.nn.one_hot(index, vector.size, dtype=vector.dtype)
        return jax.jvp(jax.grad(loss), (vector,), (unit,))[1] @ unit

    def of_gauss_newton(index: jax.Array) -> jax.Array:
        unit = jax.nn.one_hot(index, vector.size, dtype=vector.dtype)
        logits, along = jax.jvp(lambda v: outputs_fn(rebuild(v)), (vector,), (unit,))
        p = jax.nn.softmax(logits)
        centered = along - jnp.sum(p * along, axis=-1, keepdims=True)
        return jnp.mean(jnp.sum(p * centered**2, axis=-1))

    # Past the end a unit vector is zero, so that the last chunk needs no program of its own.
    indices = jnp.arange(-(-vector.size // DIRECTIONS) * DIRECTIONS)
    return {
        name: np.asarray(
            jax.jit(
                functools.partial(jax.lax.map, f, batch_size=DIRECTIONS), compiler_options=COMPILER
            )(indices)
        )[: vector.size]
        for name, f in (("hessian", of_hessian), ("gauss_newton", of_gauss_newton))
    }


# --- errors ---------------------------------------------------------------------------------------


def kinds(params: Any, counts: np.ndarray) -> np.ndarray:
    """The kind of each coordinate, in the order of `ravel_pytree`.

    Args:
      params: of `examples.lm.model.Transformer`, d numbers.
      counts: of each token in the training text, `[V]`.

    Returns:
      Indices into `KINDS`, `[d]`.

    Raises:
      ValueError: if a parameter is of no kind.
    """
    shares = counts / counts.sum()
    rows = np.where(shares >= FREQUENT, 0, np.where(shares >= RARE, 1, 2))

    # Of an array with the axes (..., one of query, key and value, heads, features).
    of_third = [KINDS.index(f"attention {x}") for x in ("q, k", "q, k", "v")]

    def kind(name: str, leaf: Any) -> np.ndarray:
        if name == "embedding":
            return np.broadcast_to(rows[:, None], leaf.shape)
        if name in ("qkv", "qkv_bias"):
            return np.broadcast_to(np.reshape(of_third, (3, 1, 1)), leaf.shape)
        if name not in KIND_BY_NAME:
            raise ValueError(f"The parameter {name} is of no kind. Add it to `KIND_BY_NAME`.")
        return np.full(leaf.shape, KINDS.index(KIND_BY_NAME[name]))

    found = jax.tree.leaves(map_by_name(kind, params))
    return np.concatenate([indices.ravel() for indices in found])


def unclipped(momentum: np.ndarray, h: np.ndarray, gamma: float) -> np.ndarray:
    """Which coordinates take a step of their own, as in `scale_by_sophia` with ρ = 1."""
    return np.abs(momentum) < np.maximum(gamma * h, EPS)


def gamma_for(momentum: np.ndarray, h: np.ndarray, win_rate: float = WIN_RATE) -> float:
    """The γ that leaves a share of all coordinates unclipped.

    Raises:
      ValueError: if h is positive for too few of them.
    """
    positive = h > 0
    ratios = np.sort(np.abs(momentum[positive]) / h[positive])
    place = round(win_rate * h.size)
    if place >= ratios.size:
        raise ValueError(f"h is positive in {positive.mean():.0%}, so no γ unclips {win_rate:.0%}.")
    return float(ratios[place])


def ranks(x: np.ndarray) -> np.ndarray:
    """The place of each number in the order of all."""
    return np.argsort(np.argsort(x, kind="stable"), kind="stable").astype(float)


def errors(
    estimate: np.ndarray, exact: np.ndarray, momentum: np.ndarray, gamma: float
) -> dict[str, float]:
    """What an estimate gets wrong, `[d]` each; see the top of this module."""
    exact, estimate = exact.astype(float), estimate.astype(float)
    wins, should = (unclipped(momentum, h, gamma) for h in (estimate, exact))
    lengths = np.linalg.norm(estimate) * np.linalg.norm(exact)
    return {
        "relative": float(np.linalg.norm(estimate - exact) / np.linalg.norm(exact)),
        "cosine": float(estimate @ exact / max(lengths, 1e-30)),
        "rank": float(np.corrcoef(ranks(estimate), ranks(exact))[0, 1]),
        "flips": float(np.mean(wins != should)),
        "win_rate": float(np.mean(wins)),
    }


class Exact(NamedTuple):
    """What estimates are held against.

    Attributes:
      diagonals: by name, `[d]` each.
      momentum: `[d]`.
      kinds: index into `KINDS`, `[d]`.
      gammas: by diagonal.
    """

    diagonals: dict[str, np.ndarray]
    momentum: np.ndarray
    kinds: np.ndarray
    gammas: dict[str, float]

    def parts(self) -> Iterator[tuple[str, np.ndarray]]:
        """Which coordinates to look at, by name: all, and each kind's."""
        yield "all", np.ones(self.kinds.size, bool)
        for index, name in enumerate(KINDS):
            yield name, self.kinds == index

    def errors(self, estimates: np.ndarray, target: str) -> dict[str, dict[str, float]]:
        """Of estimates `[n, d]`: means over them, for all coordinates and for each kind."""
        exact, gamma = self.diagonals[target], self.gammas[target]
        found: dict[str, dict[str, float]] = {}
        for name, part in self.parts():
            each = [errors(e[part], exact[part], self.momentum[part], gamma) for e in estimates]
            found[name] = {key: float(f"{np.mean([e[key] for e in each]):.4g}") for key in each[0]}
        return found

    def differences(self) -> dict[str, dict[str, float]]:
        """How the two diagonals differ, for all coordinates and for each kind.

        The Gauss-Newton diagonal's errors as an estimate of the Hessian's; its verdicts are those
        at its own γ. `negative` is the share of the Hessian's entries below zero, `negative_mass`
        their part in the sum of its absolute values.
        """
        hessian, other = self.diagonals["hessian"], self.diagonals["gauss_newton"]
        found = {}
        for name, part in self.parts():
            h, g, m = hessian[part], other[part], self.momentum[part]
            wins = {
                "hessian": unclipped(m, h, self.gammas["hessian"]),
                "gauss_newton": unclipped(m, g, self.gammas["gauss_newton"]),
            }
            row = errors(g, h, m, self.gammas["hessian"])
            row["flips"] = float(np.mean(wins["hessian"] != wins["gauss_newton"]))
            row |= {f"win_rate_{key}": float(np.mean(w)) for key, w in wins.items()}
            row["negative"] = float(np.mean(h < 0))
            row["negative_mass"] = float(np.abs(h[h < 0]).sum() / np.abs(h).sum())
            del row["win_rate"]
            found[name] = {key: float(f"{value:.4g}") for key, value in row.items()}
            found[name]["coordinates"] = int(part.sum())
        return found


# --- costs ----------------------------------------------------------------------------------------


def flops(function: Callable[..., Any], *arguments: Any) -> float:
    """XLA's count."""
    counts: Any = jax.jit(function).lower(*arguments).cost_analysis()
    return counts["flops"]


def costs(
    config: QualityConfig, trainer: Trainer, params: Any, name: str
) -> dict[tuple[int, int], float]:
    """What an estimate costs, in gradients on the whole batch, by share and probes.

    GNB's samples follow one another in a loop, whose body XLA counts once; so those past the first
    are counted as what a single one costs beyond the forward pass that all share.
    """

    def batch(share: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.batch_size // share, config.context + 1), jnp.int32)

    def estimate(probes: int, share: int) -> float:
        make = functools.partial(ESTIMATORS[name], trainer.forward, probes=probes)
        return flops(lambda p, b: make(p, b)(jax.random.key(0)), params, batch(share))

    forward = flops(lambda p, b: trainer.logits(p, b[:, :-1]), params, batch(1))
    found = {(share, 1): estimate(1, share) for share in config.shares}
    for probes in config.probes[1:]:
        found[1, probes] = (
            forward + probes * (found[1, 1] - forward)
            if TARGETS[name] == "gauss_newton"
            else estimate(probes, 1)
        )
    gradient = flops(jax.grad(trainer.loss), params, batch(1))
    return {key: value / gradient for key, value in found.items()}


# --- the experiment -------------------------------------------------------------------------------


class Trained(NamedTuple):
    """A run's end.

    Attributes:
      params: the last.
      momentum: the optimizer's m, `[d]`.
      batches: what comes next in the training text, `[batch_size, context + 1]` each.
      loss: mean of the last tenth of the run, nats a byte.
      path: params `[d]` and batch at each refresh.
    """

    params: Any
    momentum: np.ndarray
    batches: Iterator[np.ndarray]
    loss: float
    path: list[tuple[np.ndarray, np.ndarray]]


def train(config: QualityConfig, trainer: Trainer, corpus: data.Corpus) -> Trained:
    """Trains with Sophia-G."""
    steps = trainer.run.config.steps
    state = trainer.init()
    batches = data.batches(corpus.train, config.context, config.batch_size, config.seed)
    losses, path = [], []
    for number in range(steps):
        batch = next(batches)
        if trainer.refreshes_at(number):
            path.append((np.array(ravel_pytree(state.params)[0]), batch))
        state, metrics = trainer.step(state, mesh.global_batch(batch, trainer.run.mesh), number)
        losses.append(metrics["loss"])
    momentum = np.asarray(ravel_pytree(optax.tree.get(state.opt_state, "mu"))[0])
    loss = float(np.mean(jax.device_get(losses[-steps // 10 :])))
    return Trained(state.params, momentum, batches, loss, path)


def measure(
    config: QualityConfig,
    trainer: Trainer,
    trained: Trained,
    exact: Exact,
    reference: np.ndarray,
    name: str,
) -> Iterator[Row]:
    """All rows of one estimator.

    On the reference batch, at the last params: estimates of several probes on the whole batch, and
    of one probe on parts of it, averaged over refreshes. Then one average of one probe as training
    does, on half of a batch: of the next batches at the last params, and of the run's own batches
    at the params that it had then.
    """
    target, cost = TARGETS[name], costs(config, trainer, trained.params, name)
    vector, rebuild = ravel_pytree(trained.params)
    longest, chains = max(config.refreshes), config.chains
    key = jax.random.key(config.seed + list(ESTIMATORS).index(name))
    keys = jax.random.split(key, (chains, longest))
    one = functools.partial(ESTIMATORS[name], trainer.forward, probes=1)
    sizes = {config.batch_size // share for share in config.shares}
    samplers = {n: sampler(one, rebuild, n) for n in sizes | {trainer.run.curvature_batch}}

    def row(estimates: np.ndarray, target: str, **fields: Any) -> Row:
        shape = {"estimator": name, "target": target, **fields, "averages": len(estimates)}
        return {**shape, "errors": exact.errors(estimates, target)}

    here = np.broadcast_to(vector, (longest, vector.size))
    same = np.broadcast_to(reference, (longest, *reference.shape))
    for share in config.shares:
        print(f"{name}, 1/{share} of the batch", flush=True)
        draw = samplers[config.batch_size // share]
        estimates = np.stack([draw(chain, same, here) for chain in keys])
        for probes in config.probes if share == 1 else (1,):
            means = estimates[:, : longest // probes * probes]
            means = means.reshape(chains, -1, probes, vector.size).mean(axis=2)
            for refreshes in (n for n in config.refreshes if n <= means.shape[1]):
                fields = {
                    "data": "reference", "share": share, "probes": probes,
                    "refreshes": refreshes, "cost": cost[share, probes],
                }  # fmt: skip
                held = averages(means, refreshes)
                yield row(held, target, **fields)
                if target == "gauss_newton" and share == probes == 1:
                    yield row(held, "hessian", **fields)
    half = trainer.run.curvature_batch
    fields = {"share": config.batch_size // half, "probes": 1, "refreshes": longest}
    ahead = np.stack([next(trained.batches) for _ in range(longest)])
    there, behind = (np.stack(x) for x in zip(*trained.path, strict=True))
    for place, batches, vectors in (("next", ahead, here), ("run", behind, there)):
        held = averages(np.asarray(samplers[half](keys[0], batches, vectors))[None], longest)
        yield row(held, target, data=place, **fields)


# --- the plot -------------------------------------------------------------------------------------


def plot(rows: list[Row], differences: dict[str, Row], path: Path) -> None:
    """Errors against cost, of one estimate and of the optimizer's average; and by kind."""
    figure, grid = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    longest = max(r["refreshes"] for r in rows if r["data"] == "reference")
    own = [r for r in rows if r["data"] == "reference" and r["target"] == TARGETS[r["estimator"]]]
    costs = sorted(r["cost"] for r in own)
    for axes, refreshes in zip(grid[0], (1, longest), strict=True):
        for index, name in enumerate(ESTIMATORS):
            of = [r for r in own if r["estimator"] == name and r["refreshes"] == refreshes]
            for style, chosen in (
                ("o-", [r for r in of if r["share"] == 1]),
                ("s:", sorted((r for r in of if r["probes"] == 1), key=lambda r: -r["share"])),
            ):
                axes.plot(
                    [r["cost"] for r in chosen],
                    [100 * r["errors"]["all"]["flips"] for r in chosen],
                    style, color=f"C{index}", ms=4, label=name if style == "o-" else None,
                )  # fmt: skip
        axes.set(xscale="log", xlim=(0.8 * costs[0], 1.25 * costs[-1]), ylim=(0, 55))
        axes.set_xlabel("cost of a refresh, gradients on the whole batch")
        axes.set(ylabel="verdicts that differ (%)")
        axes.axhline(50, color="gray", lw=0.8, ls="--")
        axes.annotate("a coin", (costs[-1], 51), ha="right")
        ticks = [t for t in 2.0 ** np.arange(-4, 8) if costs[0] / 2 <= t <= 2 * costs[-1]]
        axes.set_xticks(ticks, [f"{t:g}" if t >= 1 else f"1/{1 / t:g}" for t in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    grid[0, 0].set_title("one estimate  (solid: probes; dotted: parts of the batch)")
    grid[0, 1].set_title(f"the average of {longest} refreshes, b2 = {B2}")
    grid[0, 1].legend(fontsize="small", loc="center right")
    names = ["all", *KINDS]
    places = np.arange(len(names))
    for index, name in enumerate(ESTIMATORS):
        (chosen,) = (
            r for r in own
            if (r["estimator"], r["share"], r["probes"], r["refreshes"]) == (name, 1, 1, longest)
        )  # fmt: skip
        heights = [100 * chosen["errors"][kind]["flips"] for kind in names]
        grid[1, 0].bar(places + 0.2 * (index - 1.5), heights, 0.2, color=f"C{index}")
    grid[1, 0].set_title(f"the same by kind of parameter: {longest} refreshes of one probe")
    grid[1, 0].set(ylabel="verdicts that differ (%)")
    for offset, key, label in (
        (-0.2, "negative", "Hessian entries below zero"),
        (0.2, "flips", "verdicts that differ, Gauss-Newton and Hessian"),
    ):
        heights = [100 * differences[kind][key] for kind in names]
        grid[1, 1].bar(places + offset, heights, 0.4, color=f"C{4 + (offset > 0)}", label=label)
    grid[1, 1].set(title="the two exact diagonals", ylabel="share (%)")
    grid[1, 1].legend(fontsize="small", loc="upper left")
    grid[1, 1].set_ylim(top=1.25 * grid[1, 1].get_ylim()[1])
    for axes in grid[1]:
        axes.set_xticks(places, names, rotation=35, ha="right", fontsize="small")
        axes.grid(alpha=0.25, axis="y")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(config: QualityConfig) -> None:
    """Trains, measures, and writes the results and the plot."""
    if config.quick:
        config = replace(config, **QUICK)
    origin = provenance("benchmarks.estimator_quality")
    model = replace(
        MODELS["tiny"], layers=config.layers, width=config.width, context=config.context
    )
    run = Workload(model, config.batch_size, config.batch_size // 2, INTERVAL).run("sophia_g")
    steps = INTERVAL * max(config.refreshes)
    run = replace(run, config=replace(run.config, steps=steps, seed=config.seed))
    trainer, corpus = Trainer(run, unroll=True), data.load("stdlib")
    print("training", flush=True)
    trained = train(config, trainer, corpus)
    reference = next(trained.batches)
    print("exact diagonals", flush=True)
    inputs, labels = jnp.asarray(reference[:, :-1]), jnp.asarray(reference[:, 1:])
    diagonals = exact_diagonals(lambda p: trainer.logits(p, inputs), labels, trained.params)
    exact = Exact(
        diagonals,
        trained.momentum,
        kinds(trained.params, np.bincount(corpus.train, minlength=256)),
        {name: gamma_for(trained.momentum, h) for name, h in diagonals.items()},
    )
    differences = exact.differences()
    rows = [
        row
        for name in ESTIMATORS
        for row in measure(config, trainer, trained, exact, reference, name)
    ]
    folder = Path("runs") if config.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        **origin,
        "settings": {**asdict(config), "b2": B2, "win_rate": WIN_RATE, "model": asdict(model)},
        "frequent": FREQUENT,
        "rare": RARE,
        "parameters": int(trained.momentum.size),
        "loss": trained.loss,
        "gammas": exact.gammas,
        "hessian_and_gauss_newton": differences,
        "rows": rows,
    }
    path = folder / "estimator_quality.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, differences, path.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(QualityConfig))
