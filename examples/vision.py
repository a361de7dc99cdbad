"""A small vision transformer on scikit-learn's digits: Sophia beside AdamW and Muon, all tuned.

Two tasks, and what the curvature is in each:

classes   Cross-entropy with smoothed labels. With targets q = (1 - α) onehot(y) + α / V the loss is
          -Σ_v q_v log p_v, its gradient in the logits p - q, its Hessian in them diag(p) - p pᵀ: q
          sums to one and drops out. So `categorical` stays exactly the Gauss-Newton matrix of the
          smoothed loss, and nothing has to be told of α. The labels are drawn from p and the
          residual is p - onehot(ŷ). To put drawn labels through the smoothed loss would be wrong:
          that residual has the mean α (p - 1/V), which the square would count as curvature, and
          the more so the larger the batch. Smoothing also keeps the curvature alive: p stops at
          q, where p (1 - p) > 0, while a plain cross-entropy that is fitted has none left.

pixels    The lower half of an image from the upper one: a Gaussian for each of the 32 pixels, its
          mean from the model, its standard deviation σ given. The loss is the mean over pixels of
          (y - f)² / 2σ², so that B, the number of predictions, is 32 for each image. `gaussian` has
          unit variance, so the estimator gets f / σ: it is then exactly the Gauss-Newton matrix of
          that loss, which depends on neither y nor the fit. With f in its place, h would be too
          small by 1 / σ², and gamma would silently mean something else. (`weights=1 / σ²` is no way
          either: only the ratios of weights matter.)

`python -m examples.vision` tunes every optimizer with as many tries, on images and seeds that are
not reported, and then trains with each on other seeds. All the runs of an optimizer share one
compilation: a whole run is one jitted function of its hyperparameters and its seed.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn
import tyro
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import sophia_optax
from benchmarks.lib.provenance import provenance

SMOOTHING = 0.1
SIGMA = 0.2  # of a pixel, where black is 0 and white 1
WIDTH, HEADS, BLOCKS, PATCH = 32, 4, 2, 2
BATCH = 64
INTERVAL = 10  # steps from one curvature estimate to the next
WARMUP, FLOOR, WEIGHT_DECAY = 0.1, 0.05, 0.1
TUNING_SEEDS = (1000, 1001)

Params = Any
Batch = dict[str, jax.Array]
Point = dict[str, float]


# --- data -----------------------------------------------------------------------------------------


def digits() -> dict[str, Batch]:
    """The 1797 images [N, 8, 8], black 0 to white 1, and their labels [N], in three splits."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    rows = {"train": order[:1000], "tune": order[1000:1400], "test": order[1400:]}
    images, labels = data.images.astype(np.float32) / 16, data.target.astype(np.int32)
    return {
        name: {"images": jnp.asarray(images[i]), "labels": jnp.asarray(labels[i])}
        for name, i in rows.items()
    }


def patches(images: jax.Array) -> jax.Array:
    """Images [B, H, W] to their patches [B, L, PATCH²]."""
    count, high, wide = images.shape
    tiles = images.reshape(count, high // PATCH, PATCH, wide // PATCH, PATCH)
    return tiles.transpose(0, 1, 3, 2, 4).reshape(count, -1, PATCH**2)


# --- model ----------------------------------------------------------------------------------------


class Block(nnx.Module):
    """Attention and an MLP, each after a norm and beside a residual."""

    def __init__(self, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, rngs=rngs)
        self.attention_norm, self.mlp_norm = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.qkv, self.out = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
        self.up, self.down = linear(WIDTH, 2 * WIDTH), linear(2 * WIDTH, WIDTH)

    def __call__(self, x_BxLxW: jax.Array) -> jax.Array:
        heads = (*x_BxLxW.shape[:2], HEADS, -1)
        qkv = jnp.split(self.qkv(self.attention_norm(x_BxLxW)), 3, axis=-1)
        mixed = jax.nn.dot_product_attention(*(part.reshape(heads) for part in qkv))
        x_BxLxW += self.out(mixed.reshape(x_BxLxW.shape))
        return x_BxLxW + self.down(jax.nn.gelu(self.up(self.mlp_norm(x_BxLxW))))


class Transformer(nnx.Module):
    """A sequence [B, L, F] to one vector [B, outputs]: an average over its pieces at the end."""

    def __init__(self, length: int, features: int, outputs: int, rngs: nnx.Rngs):
        self.embed = nnx.Linear(features, WIDTH, rngs=rngs)
        self.positions = nnx.Param(0.1 * jax.random.normal(rngs.params(), (length, WIDTH)))
        self.blocks = nnx.List([Block(rngs) for _ in range(BLOCKS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, outputs, rngs=rngs)

    def __call__(self, x_BxLxF: jax.Array) -> jax.Array:
        x_BxLxW = self.embed(x_BxLxF) + self.positions[...]
        for block in self.blocks:
            x_BxLxW = block(x_BxLxW)
        return self.head(self.norm(x_BxLxW).mean(axis=1))


# --- tasks ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Task:
    """What an optimizer is to solve, as functions of the params.

    Attributes:
      init: a seed to params.
      loss: (params, batch) to the training loss, twice differentiable: Hutchinson's estimator.
      outputs: (params, batch) to what the likelihood is of: the Gauss-Newton-Bartlett estimator.
      likelihood: of which the loss is the mean negative logarithm, up to terms that are linear in
        the outputs or constant.
      scores: (params, batch) to what is reported; "loss" is what the tuning minimises.
    """

    init: Callable[[Any], Params]
    loss: Callable[[Params, Batch], jax.Array]
    outputs: Callable[[Params, Batch], jax.Array]
    likelihood: sophia_optax.Likelihood
    scores: Callable[[Params, Batch], dict[str, jax.Array]]


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Callable, Callable]:
    """A model as two functions: a seed to its params, and params to the model with them."""
    structure, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)
    return (
        lambda seed: nnx.state(make(nnx.Rngs(params=jax.random.key(seed))), nnx.Param),
        lambda params: nnx.merge(structure, params),
    )


def smoothed_cross_entropy(
    logits: jax.Array, labels: jax.Array, alpha: float = SMOOTHING
) -> jax.Array:
    """The mean over the batch, from logits [B, V] and labels [B]."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), alpha)
    return optax.softmax_cross_entropy(logits, targets).mean()


def classes() -> Task:
    """Which digit it is."""
    init, model = functional(lambda rngs: Transformer(16, PATCH**2, 10, rngs))

    def logits(params: Params, batch: Batch) -> jax.Array:
        return model(params)(patches(batch["images"]))

    def loss(params: Params, batch: Batch) -> jax.Array:
        return smoothed_cross_entropy(logits(params, batch), batch["labels"])

    def scores(params: Params, batch: Batch) -> dict[str, jax.Array]:
        right = jnp.argmax(logits(params, batch), axis=-1) == batch["labels"]
        return {"loss": loss(params, batch), "accuracy": right.mean()}

    return Task(init, loss, logits, sophia_optax.categorical, scores)


def pixels() -> Task:
    """The lower half of an image, from its upper half."""
    init, model = functional(lambda rngs: Transformer(8, PATCH**2, 32, rngs))

    def means(params: Params, batch: Batch) -> jax.Array:
        return model(params)(patches(batch["images"][:, :4]))

    def errors(params: Params, batch: Batch) -> jax.Array:
        return means(params, batch) - batch["images"][:, 4:].reshape(-1, 32)

    def loss(params: Params, batch: Batch) -> jax.Array:
        return 0.5 * jnp.mean(jnp.square(errors(params, batch) / SIGMA))

    def scores(params: Params, batch: Batch) -> dict[str, jax.Array]:
        squared = jnp.mean(jnp.square(errors(params, batch)))
        return {"loss": loss(params, batch), "rmse": jnp.sqrt(squared)}

    def standardized(params: Params, batch: Batch) -> jax.Array:
        return means(params, batch) / SIGMA

    return Task(init, loss, standardized, sophia_optax.gaussian, scores)


TASKS = {"classes": classes, "pixels": pixels}


# --- optimizers -----------------------------------------------------------------------------------


def is_matrix(params: Params) -> Params:
    """True for the params that weight decay is for."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def blocks_matrices(params: Params) -> Params:
    """Muon's: inputs and outputs of the blocks' matrices; None for what AdamW takes."""

    def dimensions(path: Any, p: jax.Array) -> Any:
        hidden = p.ndim == 2 and "blocks" in jax.tree_util.keystr(path)
        return optax.contrib.MuonDimensionNumbers((0,), (1,)) if hidden else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def adamw(schedule: optax.Schedule, h: Point, seed: Any) -> optax.GradientTransformation:
    """AdamW."""
    return optax.adamw(schedule, h["b1"], h["b2"], weight_decay=WEIGHT_DECAY, mask=is_matrix)


def muon(schedule: optax.Schedule, h: Point, seed: Any) -> optax.GradientTransformation:
    """Muon on the blocks' matrices, AdamW on the rest at a rate of its own."""
    return optax.contrib.muon(
        schedule,
        beta=h["beta"],
        weight_decay=WEIGHT_DECAY,
        weight_decay_mask=is_matrix,
        adam_b2=0.99,
        adam_weight_decay=WEIGHT_DECAY,
        adam_learning_rate=lambda step: schedule(step) * (h["adam_rate"] / h["learning_rate"]),
        muon_weight_dimension_numbers=blocks_matrices,
    )


def sophia(schedule: optax.Schedule, h: Point, seed: Any) -> optax.GradientTransformationExtraArgs:
    """Sophia, with gamma given or from a target for the win rate; short runs want a short b2."""
    if "win_rate" in h:
        gamma = sophia_optax.win_rate_target(h["win_rate"], per_tensor=False)
    else:
        gamma = h["gamma"]
    return sophia_optax.sophia_g(
        schedule,
        b1=h["b1"],
        b2=0.9,
        gamma=gamma,
        update_interval=INTERVAL,
        weight_decay=WEIGHT_DECAY,
        mask=is_matrix,
        absolute_curvature=False,  # as the paper has it, and as the results were made
        seed=seed,
    )


def no_curvature(task: Task, params: Params, batch: Batch) -> dict[str, Any]:
    """For optimizers that take gradients alone."""
    return {}


def gauss_newton(task: Task, params: Params, batch: Batch) -> dict[str, Any]:
    """Sophia-G's."""
    return {
        "hessian_fn": sophia_optax.gauss_newton_bartlett(
            lambda p: task.outputs(p, batch), params, likelihood=task.likelihood
        )
    }


def hutchinson(task: Task, params: Params, batch: Batch) -> dict[str, Any]:
    """Sophia-H's."""
    return {"hessian_fn": sophia_optax.hutchinson(lambda p: task.loss(p, batch), params)}


@dataclass(frozen=True)
class Optimizer:
    """A row of the table.

    Attributes:
      build: the transformation, from a schedule, hyperparameters and a seed.
      curvature: what `update` takes beside the gradients.
      start: the hyperparameters that are tuned, and where the tuning begins.
    """

    build: Callable[[optax.Schedule, Point, Any], optax.GradientTransformation]
    curvature: Callable[[Task, Params, Batch], dict[str, Any]]
    start: Point


OPTIMIZERS = {
    "adamw": Optimizer(adamw, no_curvature, {"learning_rate": 1e-2, "b1": 0.9, "b2": 0.99}),
    "muon": Optimizer(muon, no_curvature, {"learning_rate": 2e-2, "adam_rate": 1e-2, "beta": 0.95}),
    "sophia_g": Optimizer(sophia, gauss_newton, {"learning_rate": 5e-3, "gamma": 0.05, "b1": 0.9}),
    "sophia_g_target": Optimizer(
        sophia, gauss_newton, {"learning_rate": 5e-3, "win_rate": 0.3, "b1": 0.9}
    ),
    "sophia_h": Optimizer(sophia, hutchinson, {"learning_rate": 5e-3, "gamma": 0.01, "b1": 0.9}),
}


# --- a run ----------------------------------------------------------------------------------------


def cosine(step: jax.Array, peak: jax.Array, steps: int) -> jax.Array:
    """Linear warm-up, then a cosine down to `FLOOR` of the peak."""
    rising = WARMUP * steps
    falling = jnp.clip((step - rising) / (steps - rising), 0, 1)
    decayed = FLOOR + (1 - FLOOR) * 0.5 * (1 + jnp.cos(jnp.pi * falling))
    return peak * jnp.where(step < rising, (step + 1) / rising, decayed)


def compiled(
    task: Task, optimizer: Optimizer, splits: dict[str, Batch], steps: int
) -> Callable[[Point, Any], dict[str, Any]]:
    """A whole run as one jitted function of hyperparameters and seed, which are traced.

    An interval has one step with an estimate and `INTERVAL - 1` without. `refresh` says so while
    the step is traced, so there is no branch left, and a `vmap` over seeds would cost no more.

    Args:
      task: what to solve.
      optimizer: how.
      splits: the data; all but "train" are held out.
      steps: a multiple of `INTERVAL`.

    Returns:
      The function. It returns the training loss and a Sophia's win rate for every interval
      [steps / INTERVAL], and the scores of each held-out split.
    """

    @jax.jit
    def run(point: Point, seed: Any) -> dict[str, Any]:
        schedule = functools.partial(cosine, peak=point["learning_rate"], steps=steps)
        tx = optax.chain(optax.clip_by_global_norm(1.0), optimizer.build(schedule, point, seed))

        def step(state: Any, key: jax.Array, refresh: bool) -> tuple[Any, jax.Array]:
            params, opt_state = state
            rows = jax.random.randint(key, (BATCH,), 0, len(splits["train"]["labels"]))
            batch = jax.tree.map(lambda leaf: leaf[rows], splits["train"])
            loss, grads = jax.value_and_grad(task.loss)(params, batch)
            curvature = optimizer.curvature(task, params, batch)
            updates, opt_state = tx.update(
                grads, opt_state, params, **curvature, **({"refresh": refresh} if curvature else {})
            )
            return (optax.apply_updates(params, updates), opt_state), loss

        def interval(state: Any, keys: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
            state, first = step(state, keys[0], refresh=True)
            state, rest = jax.lax.scan(functools.partial(step, refresh=False), state, keys[1:])
            seen = {"training": jnp.append(first, rest).mean()}
            if optimizer.curvature is not no_curvature:
                seen["win_rate"] = sophia_optax.diagnostics(state[1]).win_rate
            return state, seen

        shape = (steps // INTERVAL, INTERVAL)
        params = task.init(seed)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), shape)
        (params, _), seen = jax.lax.scan(interval, (params, tx.init(params)), keys)
        held_out = {name: task.scores(params, splits[name]) for name in splits if name != "train"}
        return {**seen, **held_out}

    return run


# --- tuning ---------------------------------------------------------------------------------------

# A hyperparameter's ladder: what a rung multiplies it by, or the odds 1 - x or x / (1 - x) of it.
RUNG = math.sqrt(3)


def rung(name: str, start: float, number: int) -> float:
    """The value so many rungs above the start; two rungs are a factor of three."""
    factor = RUNG**number
    if name in {"b1", "b2", "beta"}:
        return 1 - min(1.0, (1 - start) * factor)
    if name == "win_rate":
        odds = start / (1 - start) * factor
        return odds / (1 + odds)
    return start * factor


def tune(start: Point, tries: int, loss_of: Callable[[Point], float]) -> dict[str, Any]:
    """Nine points of a grid, then the neighbours of the best so far until tries are spent.

    The grid is over the first two hyperparameters; the others join with the neighbours.

    A neighbour is two rungs away where nothing was tried yet on that side of the best, near it in
    the other hyperparameters; else one. (Once those are all worse, what lies around them.) So an
    optimum at the edge of the grid moves the search beyond it, and all optimizers have equal tries.

    Args:
      start: the middle of the grid.
      tries: how many points may be tried.
      loss_of: runs a point; NaN where it diverged.

    Returns:
      The best point, its loss, all that were tried, and whether the best is still at an edge
      ("open").
    """
    tried: dict[tuple[int, ...], float] = {}
    sides = list(itertools.product(range(len(start)), (1, -1)))

    def point(at: tuple[int, ...]) -> Point:
        return {n: rung(n, s, k) for (n, s), k in zip(start.items(), at, strict=True)}

    def best() -> tuple[int, ...]:
        return min(tried, key=tried.__getitem__)

    def neighbour(axis: int, sign: int, distance: int) -> tuple[int, ...]:
        return tuple(k + sign * distance * (i == axis) for i, k in enumerate(best()))

    def is_edge(axis: int, sign: int) -> bool:
        moves = [[k - b for k, b in zip(at, best(), strict=True)] for at in tried]
        others = [[abs(k) for i, k in enumerate(move) if i != axis] for move in moves]
        beyond = [sign * move[axis] > 0 for move in moves]
        return not any(b and max(o, default=0) <= 1 for b, o in zip(beyond, others, strict=True))

    def following() -> list[tuple[int, ...]]:
        far = [neighbour(*side, 2) for side in sides if is_edge(*side)]
        near = [neighbour(*side, 1) for side in sides]
        moves = itertools.product(range(-4, 5), repeat=len(start))
        rest = [tuple(map(sum, zip(best(), move, strict=True))) for move in moves]
        return [at for at in far + near + rest if at not in tried][:1]

    coarse = [(-2, 0, 2)] * 2 + [(0,)] * (len(start) - 2)
    queue = list(itertools.product(*coarse[: len(start)]))
    while queue and len(tried) < tries:
        at = queue.pop(0)
        loss = loss_of(point(at))
        tried[at] = loss if math.isfinite(loss) else math.inf
        queue = queue or following()
    return {
        "point": point(best()),
        "loss": tried[best()],
        "open": any(is_edge(*side) for side in sides),
        "tried": [{**point(at), "loss": loss} for at, loss in tried.items()],
    }


def race(
    tasks: dict[str, Task], splits: dict[str, Batch], config: "Config"
) -> dict[str, dict[str, Any]]:
    """Tunes every optimizer on every task and runs it on the reported seeds.

    While one of them has its optimum at the edge of what was tried, all get four more tries, up to
    twice as many as at first.

    Args:
      tasks: by name.
      splits: "train", "tune", on which hyperparameters are chosen, and "test".
      config: steps, tries, seeds, optimizers.

    Returns:
      By task and optimizer: the tuning and the runs.
    """
    results: dict[str, dict[str, Any]] = {}
    for task_name, task in tasks.items():
        runs = {n: compiled(task, OPTIMIZERS[n], splits, config.steps) for n in config.optimizers}
        losses = {n: tuning_loss(run) for n, run in runs.items()}
        for tries in range(config.tries, 2 * config.tries + 1, 4):
            tunings = {n: tune(OPTIMIZERS[n].start, tries, losses[n]) for n in runs}
            print(
                f"{task_name}, open after {tries}: {[n for n in runs if tunings[n]['open']]}",
                flush=True,
            )
            if not any(tuning["open"] for tuning in tunings.values()):
                break
        results[task_name] = {
            n: {
                "tuning": tunings[n],
                "runs": [
                    {"seed": seed, **readable(run(tunings[n]["point"], seed))}
                    for seed in config.seeds
                ],
            }
            for n, run in runs.items()
        }
    return results


def tuning_loss(run: Callable[[Point, Any], dict[str, Any]]) -> Callable[[Point], float]:
    """The mean over the tuning seeds of the loss to minimise; what was run is not run again."""
    known: dict[tuple[float, ...], float] = {}

    def loss_of(point: Point) -> float:
        values = tuple(point.values())
        if values not in known:
            found = [float(run(point, seed)["tune"]["loss"]) for seed in TUNING_SEEDS]
            known[values] = float(np.mean(found))
        return known[values]

    return loss_of


def readable(tree: Any) -> Any:
    """Arrays as what JSON holds, to five digits."""
    digits = np.vectorize(lambda x: float(f"{x:.5g}"), otypes=[float])
    return jax.tree.map(lambda leaf: digits(leaf).tolist(), tree)


# --- what is shown --------------------------------------------------------------------------------


def spread(row: dict[str, Any], score: str) -> tuple[float, float]:
    """Mean and standard deviation of a test score over the seeds."""
    values = [run["test"][score] for run in row["runs"]]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def table(results: dict[str, dict[str, Any]]) -> Table:
    """Test scores of every optimizer, and the hyperparameters that the tuning chose."""
    shown = Table("task", "optimizer", "test loss", "score", "win rate", "tuned to")
    for task, rows in results.items():
        for name, row in rows.items():
            scores = [key for key in row["runs"][0]["test"] if key != "loss"]
            rates = [run["win_rate"] for run in row["runs"] if "win_rate" in run]
            shown.add_row(
                task,
                name,
                "{:.4f} ± {:.4f}".format(*spread(row, "loss")),
                ", ".join("{} {:.4f} ± {:.4f}".format(s, *spread(row, s)) for s in scores),
                f"{np.mean(rates):.2f}" if rates else "",
                ", ".join(f"{key} {value:.3g}" for key, value in row["tuning"]["point"].items()),
            )
    return shown


def plot(results: dict[str, dict[str, Any]]) -> Figure:
    """For every task the training loss, mean and range over seeds, and the test loss of each."""
    figure = Figure(figsize=(5 * len(results), 7), layout="constrained")
    axes = figure.subplots(2, len(results), squeeze=False)
    for column, (task, rows) in enumerate(results.items()):
        curves, dots = axes[:, column]
        for index, (name, row) in enumerate(rows.items()):
            losses = np.array([run["training"] for run in row["runs"]])
            steps = (np.arange(losses.shape[1]) + 1) * INTERVAL
            curves.plot(steps, losses.mean(axis=0), color=f"C{index}", label=name)
            curves.fill_between(
                steps, losses.min(axis=0), losses.max(axis=0), color=f"C{index}", alpha=0.2, lw=0
            )
            tested = [run["test"]["loss"] for run in row["runs"]]
            dots.plot(tested, [index] * len(tested), "o", color=f"C{index}", alpha=0.6)
            dots.plot(np.mean(tested), index, "k|", markersize=16)
        curves.set(title=task, xlabel="step", ylabel="training loss", yscale="log")
        curves.legend(fontsize=8)
        dots.set(xlabel="test loss (a dot a seed, a bar their mean)", yticks=range(len(rows)))
        dots.set_yticklabels(list(rows))
        dots.invert_yaxis()
    return figure


# --- the command ----------------------------------------------------------------------------------

Name = Literal["adamw", "muon", "sophia_g", "sophia_g_target", "sophia_h"]


@dataclass(frozen=True)
class Config:
    """What to compare.

    Attributes:
      optimizers: the rows of the table.
      steps: of every run, a multiple of ten.
      tries: how many hyperparameters are tried for every optimizer on a task, to begin with.
      seeds: of the runs that are reported; tuning uses others.
      out: the folder for the results.
    """

    optimizers: tuple[Name, ...] = ("adamw", "muon", "sophia_g", "sophia_g_target", "sophia_h")
    steps: int = 200
    tries: int = 20
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    out: Path = Path("runs")


def main(config: Config, name: str = "vision", tasks: dict[str, Callable] = TASKS) -> None:
    """Races, prints the table, and writes `name`.json and `name`.png into the config's folder."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    whole = {**provenance(f"examples.{name}"), "settings": settings}
    whole["versions"]["scikit-learn"] = sklearn.__version__
    whole["results"] = results = race({n: make() for n, make in tasks.items()}, digits(), config)
    Console(width=160).print(table(results))
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    plot(results).savefig(config.out / f"{name}.png", dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Config))
