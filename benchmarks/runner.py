"""Training runs that share one compilation: hyperparameters are arguments of the compiled step.

The model, the data and the optimizers are those of `examples.lm`; what differs is that a grid of a
hundred points compiles once for each optimizer, where the trainer would compile a hundred times.
"""

import functools
import time
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import sophia_optax
from examples.lm import data
from examples.lm.config import MODELS, Hyperparameters, ModelConfig
from examples.lm.model import Transformer
from examples.lm.optimizers import OPTIMIZERS, Forward, Optimizer

FLOOR = 0.05  # the schedule's end, as a share of its peak

# What may change from run to run without a new compilation.
TRACED = (
    *("learning_rate", "matrix_learning_rate", "b1", "b2", "gamma", "win_rate"),
    *("weight_decay", "warmup", "clip_norm"),
)


@dataclass(frozen=True)
class Setting:
    """What the runs that are compared have in common.

    Attributes:
      model: the transformer; its vocabulary is the bytes'.
      batch_size: sequences in a step.
      curvature_batch: sequences in a curvature estimate.
      update_interval: steps from one estimate to the next.
    """

    model: ModelConfig = field(default_factory=lambda: MODELS["tiny"])
    batch_size: int = 8
    curvature_batch: int = 4
    update_interval: int = 10

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.batch_size * self.model.context


@dataclass(frozen=True)
class Outcome:
    """One run.

    Attributes:
      loss: on the held-out split after the last step, nats a token; NaN if the run diverged.
      seconds: of all steps, compilation and validation left out.
      win_rates: at each refresh, for a Sophia.
      gammas: at each refresh, for a Sophia.
      training: the mean training loss of each twentieth of the run.
      more: what else the runner keeps, at each refresh.
    """

    loss: float
    seconds: float
    win_rates: list[float]
    gammas: list[float]
    training: list[float]
    more: dict[str, list[float]] = field(default_factory=dict)


def cosine(step: Any, peak: Any, warmup: Any, steps: Any) -> jax.Array:
    """Linear warm-up over `warmup * steps` steps, then a cosine down to `FLOOR` of the peak."""
    rising = jnp.maximum(1.0, jnp.round(warmup * steps))
    falling = jnp.clip((step - rising) / jnp.maximum(steps - rising, 1.0), 0.0, 1.0)
    decayed = FLOOR + (1 - FLOOR) * 0.5 * (1 + jnp.cos(jnp.pi * falling))
    return peak * jnp.where(step < rising, step / rising, decayed)


class Runner:
    """One optimizer on one setting: compiled once, run with any hyperparameters.

    Attributes:
      row: how the optimizer is built, from `examples.lm` or the caller's own.
    """

    def __init__(self, row: Optimizer | str, setting: Setting):
        self.row = OPTIMIZERS[row] if isinstance(row, str) else row
        self.setting = setting
        self.model = replace(setting.model, vocab_size=256)
        abstract = nnx.eval_shape(lambda: Transformer(self.model, nnx.Rngs(0)))
        self.structure = nnx.split(abstract, nnx.Param)[0]
        self.forward = Forward(self.logits, self.loss_fn)
        self.init = jax.jit(self.new_state)
        self.step = jax.jit(self.train_step, static_argnames="refresh", donate_argnums=0)
        self.evaluate = jax.jit(self.loss_fn)

    def logits(self, params: Any, tokens_BxL: jax.Array) -> jax.Array:
        """The model as a function of its params."""
        return nnx.merge(self.structure, params)(tokens_BxL, unroll=True)

    def loss_fn(self, params: Any, batch_BxL: jax.Array) -> jax.Array:
        """Mean nats a token."""
        logits_BxLxV = self.logits(params, batch_BxL[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV, batch_BxL[:, 1:])
        return losses.mean()

    def optimizer(self, h: Hyperparameters, steps: Any) -> optax.GradientTransformationExtraArgs:
        """The transformation for hyperparameters that may be traced."""
        h = replace(h, update_interval=self.setting.update_interval)
        schedule = functools.partial(cosine, peak=h.learning_rate, warmup=h.warmup, steps=steps)
        return optax.chain(optax.clip_by_global_norm(h.clip_norm), self.row.build(h, schedule))

    def new_state(self, seed: Any) -> tuple[Any, Any]:
        """Params and optimizer state before the first step."""
        params = nnx.state(
            Transformer(self.model, nnx.Rngs(params=jax.random.key(seed))), nnx.Param
        )
        return params, self.optimizer(self.row.tiny, 1).init(params)

    def train_step(
        self, state: Any, batch: jax.Array, traced: dict[str, Any], *, refresh: bool
    ) -> tuple[Any, dict[str, jax.Array]]:
        """One step; whether the curvature is estimated is the host's to say."""
        params, opt_state = state
        h = replace(self.row.tiny, **{n: v for n, v in traced.items() if hasattr(self.row.tiny, n)})
        tx = self.optimizer(h, traced["steps"])
        loss, grads = jax.value_and_grad(self.loss_fn)(params, batch)
        part = batch if self.row.whole_batch else batch[: self.setting.curvature_batch]
        extra_args = self.row.extra_args(self.forward, params, part)
        if "hessian_fn" in extra_args:
            extra_args["refresh"] = refresh
        updates, opt_state = tx.update(grads, opt_state, params, **extra_args)
        metrics = {"loss": loss}
        if "hessian_fn" in extra_args:
            metrics |= self.diagnostics(opt_state)
        return (optax.apply_updates(params, updates), opt_state), metrics

    def due(self, step: int) -> bool:
        """Whether the curvature is estimated in a step."""
        return step % self.setting.update_interval == 0

    def diagnostics(self, opt_state: Any) -> dict[str, Any]:
        """What is kept of a Sophia's state at each refresh."""
        found = sophia_optax.diagnostics(opt_state)
        return {"win_rate": found.win_rate, "gamma": found.gamma}

    def seconds(self, held: list[Any], batch: Any, traced: dict[str, jax.Array]) -> float:
        """Seconds of an average step over one interval; `held` is the state before and after."""
        start = time.perf_counter()
        for number in range(self.setting.update_interval):
            held[0], _ = self.step(held[0], batch, traced, refresh=self.due(number))
        jax.block_until_ready(held[0])
        return (time.perf_counter() - start) / self.setting.update_interval

    def flops(self, **hyperparameters: Any) -> float:
        """XLA's count for an average step; it does not depend on the hyperparameters' values."""
        shape = self.setting.batch_size, self.model.context + 1
        batch = jax.ShapeDtypeStruct(shape, jnp.int32)
        state = jax.eval_shape(self.new_state, 0)
        traced = self.traced(1, **hyperparameters)
        plain, refresh = (
            self.step.lower(state, batch, traced, refresh=r).cost_analysis()["flops"]
            for r in (False, True)
        )
        return plain + (refresh - plain) / self.setting.update_interval

    def traced(self, steps: int, **hyperparameters: Any) -> dict[str, jax.Array]:
        """The step's last argument: the row's hyperparameters but for those given."""
        h = replace(self.row.tiny, **hyperparameters)
        values = {n: getattr(h, n, None) for n in TRACED} | {"steps": steps}
        return {n: jnp.float32(v) for n, v in values.items() if v is not None}

    def run(
        self,
        corpus: data.Corpus,
        steps: int,
        seed: int,
        split: str,
        **hyperparameters: Any,
    ) -> Outcome:
        """Trains once.

        Args:
          corpus: the text.
          steps: how long; the schedule's length too.
          seed: of params, data order and curvature noise.
          split: what the loss is reported on: "tune" while tuning, "validation" for the table.
          **hyperparameters: those that differ from the row's `tiny` ones.

        Returns:
          The run's losses.
        """
        traced = self.traced(steps, **hyperparameters)
        state = self.init(seed)
        batches = data.batches(corpus.train, self.model.context, self.setting.batch_size, seed)
        warm = next(batches)  # compile outside of the clock; donated, so on a copy
        for refresh in (True, False):
            self.step(jax.tree.map(jnp.copy, state), warm, traced, refresh=refresh)
        losses, seen = [], []
        start = time.perf_counter()
        for number in range(steps):
            refresh = self.due(number)
            state, metrics = self.step(state, next(batches), traced, refresh=refresh)
            losses.append(metrics["loss"])
            if refresh:
                seen.append(metrics)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - start
        training = np.array(jax.device_get(losses))
        held_out = data.evaluation(getattr(corpus, split), self.model.context, 32, 16)
        return Outcome(
            loss=float(np.mean([self.evaluate(state[0], batch) for batch in held_out])),
            seconds=seconds,
            win_rates=[float(m["win_rate"]) for m in seen if "win_rate" in m],
            gammas=[float(m["gamma"]) for m in seen if "gamma" in m],
            training=[float(part.mean()) for part in np.array_split(training, min(20, steps))],
            more={
                name: [float(m[name]) for m in seen]
                for name in (seen[0] if seen else {})
                if name not in ("loss", "win_rate", "gamma")
            },
        )
