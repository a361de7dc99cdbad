"""A small vision transformer on scikit-learn's digits, trained with AdamW and several Sophias.

Two tasks, and the curvature of each:

classes   Cross-entropy with smoothed labels q = (1 - α) onehot(y) + α / V. Its Hessian in the
          logits is diag(p) - p pᵀ, as q sums to one and drops out. So `categorical` is exactly the
          Gauss-Newton matrix of the smoothed loss: labels are sampled from p, with the residual
          p - onehot(ŷ). Sampled labels must not be smoothed: that residual would have the mean
          α (p - 1/V), whose square counts as curvature.

pixels    The lower half of an image from its upper half: a Gaussian for each of the 32 pixels, with
          the model's mean f and a given σ. The loss is the mean over pixels of (y - f)² / 2σ², and
          `gaussian` has unit variance. So the estimator gets f / σ. With f, h would be too small by
          1 / σ². `weights=1 / σ²` does not help, as only the ratios of weights matter.

`python -m examples.vision` trains each task with each optimizer, or with those of `--optimizers`;
`benchmarks/digits.py` compares tuned optimizers over several seeds.
"""

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import sophia_optax
from examples.arguments import whole

SMOOTHING = 0.1
SIGMA = 0.2  # of a pixel, where black is 0 and white 1
WIDTH, HEADS, BLOCKS, PATCH = 32, 4, 2, 2
BATCH = 64

Params = Any
Batch = dict[str, jax.Array]


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


class Block(nnx.Module):
    """Attention and an MLP, each after a norm and with a residual."""

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


@dataclass(frozen=True, eq=False)
class Task:
    """What an optimizer is to solve, as functions of the params.

    Attributes:
      init: a seed to params.
      loss: (params, batch) to the training loss, for Hutchinson's estimator.
      outputs: (params, batch) to the arguments of the likelihood, for Gauss-Newton-Bartlett's.
      likelihood: its mean negative logarithm is the loss, up to terms linear in the outputs.
      scores: (params, batch) to what is reported of held-out data.
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


def gauss_newton(task: Task, params: Params, batch: Batch) -> sophia_optax.HessianFn:
    """Sophia-G's estimator."""
    return sophia_optax.gauss_newton_bartlett(
        lambda p: task.outputs(p, batch), params, likelihood=task.likelihood
    )


def hutchinson(task: Task, params: Params, batch: Batch) -> sophia_optax.HessianFn:
    """Sophia-H's estimator."""
    return sophia_optax.hutchinson(lambda p: task.loss(p, batch), params)


Estimator = Callable[[Task, Params, Batch], sophia_optax.HessianFn]
ESTIMATORS: dict[str, Estimator | None] = {
    "adamw": None,
    "sophia_g": gauss_newton,
    "sophia_h": hutchinson,
    "sophia_g_eigenbasis": gauss_newton,
}


def train(
    task: Task,
    tx: optax.GradientTransformation,
    estimator: Estimator | None,
    splits: dict[str, Batch],
    steps: int,
    seed: Any,
) -> dict[str, Any]:
    """A whole run as one function of arrays, to be jitted.

    Returns:
      The training loss and a Sophia's win rate at every step, and each held-out split's scores.
    """
    tx = optax.with_extra_args_support(tx)

    def step(state: Any, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        params, opt_state = state
        rows = jax.random.randint(key, (BATCH,), 0, len(splits["train"]["labels"]))
        batch = jax.tree.map(lambda leaf: leaf[rows], splits["train"])
        loss, grads = jax.value_and_grad(task.loss)(params, batch)
        curvature = {"hessian_fn": estimator(task, params, batch)} if estimator else {}
        updates, opt_state = tx.update(grads, opt_state, params, **curvature)
        seen = {"training": loss}
        if estimator:
            seen["win_rate"] = sophia_optax.diagnostics(opt_state).win_rate
        return (optax.apply_updates(params, updates), opt_state), seen

    params = task.init(seed)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), steps)
    (params, _), seen = jax.lax.scan(step, (params, tx.init(params)), keys)
    held_out = {name: task.scores(params, splits[name]) for name in splits if name != "train"}
    return {**seen, **held_out}


def optimizers(steps: int) -> dict[str, tuple[optax.GradientTransformation, Estimator | None]]:
    """Each optimizer and its curvature; short runs want a short average of it."""

    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps, peak / 20)

    def mask(params: Params) -> Params:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    common = {"b1": 0.7, "b2": 0.9, "weight_decay": 0.1, "mask": mask}
    built = {
        "adamw": optax.adamw(schedule(1e-2), 0.8, 0.99, weight_decay=0.1, mask=mask),
        "sophia_g": sophia_optax.sophia_g(schedule(5e-3), gamma=0.02, **common),
        "sophia_h": sophia_optax.sophia_h(schedule(5e-3), gamma=0.03, **common),
        "sophia_g_eigenbasis": sophia_optax.sophia_g(
            schedule(5e-3), gamma=0.02, eigenbasis={"basis_interval": 1}, **common
        ),
    }
    clip = optax.clip_by_global_norm(1.0)
    return {name: (optax.chain(clip, tx), ESTIMATORS[name]) for name, tx in built.items()}


def main(tasks: dict[str, Callable[[], Task]] = TASKS) -> None:
    """Trains each task with each optimizer and prints what is left on the test images."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=whole(1), default=200, help="of each run")
    parser.add_argument("--seed", type=whole(0), default=0)
    names = list(ESTIMATORS)
    parser.add_argument("--optimizers", nargs="+", choices=names, default=names)
    config = parser.parse_args()
    splits, built = digits(), optimizers(config.steps)
    for task_name, make in tasks.items():
        for name in config.optimizers:
            tx, estimator = built[name]
            run = jax.jit(functools.partial(train, make(), tx, estimator, splits, config.steps))
            scores = {k: float(v) for k, v in run(config.seed)["test"].items()}
            print(task_name, name, *(f"{key} {value:.4f}" for key, value in scores.items()))


if __name__ == "__main__":
    main()
