"""What the rows of a large vocabulary do that the curvature has not seen, and what mends it.

    python -m benchmarks.rare_rows [--quick]

A row of an embedding whose token was in a gradient's batch, and never in an estimate's, has h = 0:
it takes sign steps for as long as its momentum is not zero. The runs count these rows and compare
ways to treat them, on a byte-pair vocabulary of the standard library's sources. With tied
embeddings the output layer gives curvature to every row; a few variants run with these too.

The learning rate of each variant climbs from one start, with the same number of tries for all, on
the `tune` split and a seed of its own. The best rate runs on other seeds and is judged on the
`validation` split. Runs are kept in `results/rare_rows.jsonl` as they end, and what is there is not
run again; `results/rare_rows.json` has the table.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import sophia_optax
from benchmarks.lib.journal import Journal
from benchmarks.lib.provenance import RESULTS, provenance
from benchmarks.lib.sweep import TUNING_SEED
from examples.lm import data
from examples.lm.config import ModelConfig
from examples.lm.model import Transformer, normal
from examples.lm.optimizers import learning_rate
from examples.lm.tune import search
from sophia_optax._scale_by_sophia import SophiaRule, transformation
from sophia_optax._win_rate_target import FixedGamma, WinRateTarget


@dataclass(frozen=True)
class FlooredRule(SophiaRule):
    """The denominator is at least a share of the mean curvature of the parameter."""

    share: float = 0.0

    def denominator(self, h: jax.Array, scale: Any) -> jax.Array:
        """max(γ |h|, share γ mean |h|, ε)."""
        curvature = self.scaled_curvature(h, scale)
        return jnp.maximum(curvature, jnp.maximum(self.share * curvature.mean(), self.eps))


@dataclass(frozen=True)
class WaitingRule(SophiaRule):
    """A coordinate without curvature waits for some."""

    def step(self, m: jax.Array, h: jax.Array, scale: Any) -> jax.Array:
        """Zero where h is zero."""
        return jnp.where(h == 0, 0.0, super().step(m, h, scale))


@dataclass(frozen=True)
class Variant:
    """One way to treat rows without curvature.

    Attributes:
      rule: makes the equations of a step.
      gamma: what sets γ.
      sampling: of the Gauss-Newton-Bartlett estimator.
      whole: whether the estimate is of the whole batch.
      fallback: whether N g² stands in where the estimate is zero, with N the tokens of the batch.
      adam: whether Adam has the embedding, and Sophia the rest.
    """

    rule: Callable[..., SophiaRule] = SophiaRule
    gamma: FixedGamma | WinRateTarget = FixedGamma(0.05)  # noqa: RUF009 - frozen
    sampling: Any = "labels"
    whole: bool = False
    fallback: bool = False
    adam: bool = False


VARIANTS = {
    "paper": Variant(),
    "target": Variant(gamma=sophia_optax.win_rate_target(0.7)),
    "weighted target": Variant(gamma=sophia_optax.win_rate_target(0.8, weighted=True)),
    "target 0.05": Variant(gamma=sophia_optax.win_rate_target(0.05)),
    "global target": Variant(gamma=sophia_optax.win_rate_target(0.7, per_tensor=False)),
    "target, floor 1 mean": Variant(
        functools.partial(FlooredRule, share=1.0), sophia_optax.win_rate_target(0.7)
    ),
    "adam": Variant(adam=True),
    "floor 1 mean": Variant(functools.partial(FlooredRule, share=1.0)),
    "whole batch": Variant(whole=True),
    "gradient squared": Variant(fallback=True),
    "curvature propagation": Variant(sampling="curvature_propagation"),
    "floor 0.1 mean": Variant(functools.partial(FlooredRule, share=0.1)),
    "wait": Variant(WaitingRule),
}


@dataclass(frozen=True)
class RareConfig:
    """What to compare.

    Attributes:
      vocab_size: of the byte-pair encoding.
      width: of the model.
      context: tokens of a sequence.
      batch_size: sequences of a step.
      curvature_batch: sequences of an estimate, where the variant does not say otherwise.
      steps: of a run.
      learning_rate: where each variant's search begins.
      tries: learning rates that each variant may try.
      seeds: of the reported runs; tuning uses another.
      variants: which to run: AdamW, and names in `VARIANTS`.
      tied: those that run with tied embeddings too.
      quick: a few steps of a small vocabulary, to see that it runs; writes no results.
      runs: the file of finished runs.
    """

    vocab_size: int = 8192
    width: int = 64
    context: int = 64
    batch_size: int = 8
    curvature_batch: int = 2
    steps: int = 200
    learning_rate: float = 4e-3
    tries: int = 5
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = ("adamw", *VARIANTS)
    tied: tuple[str, ...] = ("adamw", "paper", "target", "weighted target", "target 0.05")
    quick: bool = False
    runs: Path = RESULTS / "rare_rows.jsonl"


class Untied(Transformer):
    """The transformer with an output matrix of its own."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.head = normal(
            rngs, config.init_scale, vocab=config.vocab_size or 0, embed=config.width
        )

    def __call__(self, tokens_BxL: jax.Array) -> jax.Array:  # pyright: ignore
        """Returns logits, `[B, L, V]`."""
        x_BxLxD = self.embedding[...][tokens_BxL] + self.positions[...][: tokens_BxL.shape[1]]
        structure, layers = nnx.split(self.blocks)

        def layer(x_BxLxD: jax.Array, params: nnx.State) -> tuple[jax.Array, None]:
            return nnx.merge(structure, params)(x_BxLxD, "xla", 0.0, None), None

        x_BxLxD, _ = jax.lax.scan(layer, x_BxLxD, layers, unroll=True)
        return jnp.einsum("BLD,VD->BLV", self.norm(x_BxLxD), self.head[...])


@dataclass
class Model:
    """One model and variant; the learning rate is traced, so that its runs compile once."""

    config: RareConfig
    corpus: data.Corpus
    tied: bool
    name: str
    model: ModelConfig = field(init=False)

    def __post_init__(self) -> None:
        self.model = ModelConfig(
            2, self.config.width, 4, self.config.context, self.corpus.vocab_size, 0.06
        )
        kind = Transformer if self.tied else Untied
        self.make = lambda rngs: kind(self.model, rngs)
        self.structure = nnx.split(nnx.eval_shape(lambda: self.make(nnx.Rngs(0))), nnx.Param)[0]
        self.step = jax.jit(self.train_step, donate_argnums=0)
        self.evaluate = jax.jit(self.loss_fn)

    def logits(self, params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(self.structure, params)(tokens)

    def loss_fn(self, params: Any, batch: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            self.logits(params, batch[:, :-1]), batch[:, 1:]
        )
        return losses.mean()

    def optimizer(self, rate: Any) -> optax.GradientTransformationExtraArgs:
        schedule = functools.partial(learning_rate, peak=rate, warmup=0.1, steps=self.config.steps)
        scale: Any = optax.scale_by_adam(0.9, 0.95)
        if self.name != "adamw":
            rule = VARIANTS[self.name].rule(0.9, 0.99, 1e-12, 1.0)
            sophia = transformation(rule, VARIANTS[self.name].gamma)
            scale = (
                optax.partition({True: scale, False: sophia}, in_embedding)
                if VARIANTS[self.name].adam
                else sophia
            )
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            scale,
            optax.add_decayed_weights(0.1),
            optax.scale_by_learning_rate(schedule),
        )

    def hessian_fn(self, params: Any, batch: jax.Array, grads: Any) -> Any:
        variant = VARIANTS[self.name]
        part = batch if variant.whole else batch[: self.config.curvature_batch]
        estimate = sophia_optax.gauss_newton_bartlett(
            lambda p: self.logits(p, part[:, :-1]), params, sampling=variant.sampling
        )
        if not variant.fallback:
            return estimate
        tokens = batch[:, 1:].size
        return lambda key: jax.tree.map(
            lambda e, g: jnp.where(e == 0, tokens * g**2, e), estimate(key), grads
        )

    def train_step(self, state: Any, batch: jax.Array, rate: Any) -> tuple[Any, dict[str, Any]]:
        params, opt_state = state
        grads = jax.grad(self.loss_fn)(params, batch)
        tx, more = optax.with_extra_args_support(self.optimizer(rate)), {}
        if self.name != "adamw":
            more["hessian_fn"] = self.hessian_fn(params, batch, grads)
        updates, opt_state = tx.update(grads, opt_state, params, **more)
        rows = {}
        if self.name != "adamw" and not VARIANTS[self.name].adam:
            m, h = opt_state[1].mu["embedding"][...], opt_state[1].nu["embedding"][...]
            flat = jnp.all(h == 0, axis=1) & jnp.any(m != 0, axis=1)
            touched = jnp.any(grads["embedding"][...] != 0, axis=1)
            rows = {
                "flat_rows": flat.mean(),
                "flat_of_touched": (flat & touched).sum() / touched.sum(),
            }
        return (optax.apply_updates(params, updates), opt_state), rows

    def run(self, rate: float, seed: int, split: str) -> dict[str, Any]:
        """Trains once, and returns the loss on a split and the shares of rows."""
        params = nnx.state(self.make(nnx.Rngs(params=jax.random.key(seed))), nnx.Param)
        params = nnx.to_pure_dict(params)
        state = (params, self.optimizer(rate).init(params))
        stream = data.batches(self.corpus.train, self.config.context, self.config.batch_size, seed)
        rows = []
        for _ in range(self.config.steps):
            state, counts = self.step(state, jnp.asarray(next(stream)), rate)
            rows.append(counts)
        batches = data.evaluation(getattr(self.corpus, split), self.config.context, 16, 16)
        loss = float(np.mean([self.evaluate(state[0], batch) for batch in batches]))
        return {
            "loss": loss,
            **{key: float(np.mean([row[key] for row in rows])) for key in rows[0]},
        }


def in_embedding(params: Any) -> Any:
    """Whether each leaf is the embedding."""
    return {
        name: jax.tree.map(lambda _, mine=name == "embedding": mine, part)
        for name, part in params.items()
    }


def enter(
    config: RareConfig, journal: Journal, corpus: data.Corpus, name: str, tied: bool = False
) -> None:
    """Tunes the learning rate of a variant, and runs the best one on other seeds."""
    model = Model(config, corpus, tied, name)
    names = {"variant": name, "tied": True} if tied else {"variant": name}

    def run(rate: float, seed: int, split: str) -> float:
        key = {**names, "learning_rate": rate, "seed": seed, "split": split}
        return journal.get(key, lambda: model.run(rate, seed, split))["loss"]

    rate = {"learning_rate": (config.learning_rate,)}
    best = search(rate, config.tries, lambda p: run(p["learning_rate"], TUNING_SEED, "tune"))
    for seed in config.seeds:
        run(best["point"]["learning_rate"], seed, "validation")


def summarize(rows: list[dict[str, Any]], tied: bool = False) -> dict[str, dict[str, Any]]:
    """Each variant's tuned learning rate, losses by seed, and share of rows by seed."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        key = row["key"]
        if key["split"] == "validation" and key.get("tied", False) == tied:
            new = {"learning_rate": key["learning_rate"], "losses": [], "flat_of_touched": []}
            place = found.setdefault(key["variant"], new)
            place["losses"].append(row["loss"])
            if "flat_of_touched" in row:
                place["flat_of_touched"].append(row["flat_of_touched"])
    return found


def main(config: RareConfig) -> None:
    """Runs what is missing, and writes the table."""
    if config.quick:
        few = {"vocab_size": 300, "steps": 4, "tries": 1, "seeds": (0,), "batch_size": 4}
        config = replace(config, **few, variants=("gradient squared", "adam"), tied=())
    origin = provenance("benchmarks.rare_rows")
    journal = Journal(None if config.quick else config.runs)
    corpus = data.load("stdlib", f"bpe:{config.vocab_size}")
    for name in config.variants:
        enter(config, journal, corpus, name)
    for name in config.tied:
        enter(config, journal, corpus, name, tied=True)
    if config.quick:
        return
    settings = {
        k: v for k, v in vars(config).items() if k not in ("runs", "variants", "tied", "quick")
    }
    result = {
        **origin,
        "settings": settings,
        "results": summarize(journal.rows),
        "tied": summarize(journal.rows, tied=True),
    }
    (RESULTS / "rare_rows.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(RareConfig))
