"""The training step and the loop around it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

import sophia_optax
from examples.lm import data, mesh, optimizers
from examples.lm.config import TrainConfig, UsageError, curvature_size, model_config
from examples.lm.model import Transformer, compute_dtype

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that a step changes."""

    step: jax.Array
    params: nnx.State
    opt_state: optax.OptState


def microbatches(batch_BxL: jax.Array, count: int) -> jax.Array:
    """Cuts a batch into `[count, B / count, L]`, each part spread over all the devices."""
    return batch_BxL.reshape(-1, count, batch_BxL.shape[-1]).swapaxes(0, 1)


class Trainer:
    """The compiled functions of one run: `init`, `step`, `evaluate`.

    Attributes:
      init: () -> TrainState, every array born in its sharding.
      evaluate: (params, windows [B, L + 1]) -> the mean loss, a scalar.
    """

    def __init__(
        self, config: TrainConfig, device_mesh: Mesh, vocab_size: int, *, unroll: bool = False
    ):
        self.config, self.mesh, self.unroll = config, device_mesh, unroll
        self.model = model_config(config, vocab_size)
        self.tx, self.schedule = optimizers.build(config)
        row = optimizers.OPTIMIZERS[config.optimizer]
        self.extra_args = row.extra_args
        self.curvature_size = config.batch_size if row.whole_batch else curvature_size(config)
        self.has_curvature = self.extra_args is not optimizers.no_curvature
        self.is_sophia = self.extra_args in (optimizers.gauss_newton, optimizers.hutchinson)
        self.dtype = compute_dtype(device_mesh.devices.flat[0].platform)
        self.structure = nnx.split(self.abstract_model(), nnx.Param)[0]
        self.forward = optimizers.Forward(self.logits, self.loss)

        self.abstract_state = jax.eval_shape(self.new_state)
        self.shardings = mesh.shardings(device_mesh, self.abstract_state)
        batch = mesh.batch_sharding(device_mesh)
        self.init = jax.jit(self.new_state, out_shardings=self.shardings)
        self.evaluate = jax.jit(
            self.loss,
            in_shardings=(self.shardings.params, batch),
            out_shardings=mesh.replicated(device_mesh),
        )
        self._step = jax.jit(
            self.train_step,
            static_argnums=2,
            donate_argnums=0,
            in_shardings=(self.shardings, batch),
            out_shardings=(self.shardings, mesh.replicated(device_mesh)),
        )

    def abstract_model(self) -> Transformer:
        """The model's structure, without its numbers."""
        return nnx.eval_shape(lambda: Transformer(self.model, nnx.Rngs(0)))

    def new_state(self) -> TrainState:
        """The state before the first step."""
        params = nnx.state(Transformer(self.model, nnx.Rngs(self.config.seed)), nnx.Param)
        return TrainState(jnp.zeros((), jnp.int32), params, self.tx.init(params))

    def lower(self, state: TrainState, batch: jax.Array, refresh: bool | None) -> Any:
        """The step before compilation, for shapes in place of arrays."""
        return self._step.lower(state, batch, refresh)

    def abstract_sharded_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state: what a checkpoint is read into."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.abstract_state,
            self.shardings,
        )

    def logits(self, params: nnx.State, tokens_BxL: jax.Array) -> jax.Array:
        """The model as a function of its params."""
        return nnx.merge(self.structure, params)(
            tokens_BxL,
            dtype=self.dtype,
            attention=self.config.attention,
            remat=self.config.remat,
            unroll=self.unroll,
            mesh=self.mesh,
        )

    def loss(self, params: nnx.State, batch_BxL: jax.Array) -> jax.Array:
        """Mean nats a token."""
        logits_BxLxV = self.logits(params, batch_BxL[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV, batch_BxL[:, 1:])
        return losses.mean()

    def loss_and_gradient(self, params: nnx.State, batch_BxL: jax.Array) -> tuple[jax.Array, Any]:
        """The batch's, by way of its microbatches, one in memory at a time."""
        gradient = jax.value_and_grad(self.loss)
        if self.config.accumulate == 1:
            return gradient(params, batch_BxL)

        def add(total: Any, part: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, part)), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(add, zeros, microbatches(batch_BxL, self.config.accumulate))
        return jax.tree.map(lambda x: x / self.config.accumulate, total)

    def train_step(
        self, state: TrainState, batch_BxL: jax.Array, refresh: bool | None = None
    ) -> tuple[TrainState, Metrics]:
        """One step of the optimizer, with one curvature estimate where it is due."""
        loss, grads = self.loss_and_gradient(state.params, batch_BxL)
        extra_args = {}
        if self.has_curvature:
            part = sophia_optax.curvature_batch(batch_BxL, self.curvature_size)
            extra_args = self.extra_args(self.forward, state.params, part)
        if self.is_sophia:
            extra_args["refresh"] = refresh
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params, **extra_args)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": self.schedule(state.step),
        }
        if self.is_sophia:
            metrics["win_rate"] = sophia_optax.diagnostics(opt_state).win_rate
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    def refreshes_at(self, step: int) -> bool:
        """Whether that step estimates the curvature."""
        return self.has_curvature and step % self.config.update_interval == 0

    def step(self, state: TrainState, batch: jax.Array, number: int) -> tuple[TrainState, Metrics]:
        """The compiled step; `number` is the state's own, known here without asking the device."""
        on_host = self.config.refresh == "host" and self.is_sophia
        return self._step(state, batch, self.refreshes_at(number) if on_host else None)


@dataclass
class Result:
    """What a run leaves behind.

    Attributes:
      records: the lines of metrics.jsonl, in order.
      seconds: of each step, the first (which compiles) left out.
      refreshed: whether each of those steps estimated the curvature.
      validation_loss: after the last step, nats a token.
      steps: how many steps the state has behind it.
    """

    records: list[dict[str, float]]
    seconds: list[float]
    refreshed: list[bool]
    validation_loss: float
    steps: int = 0

    @property
    def step_seconds(self) -> float:
        """Of an average step, curvature included; a machine's hiccups count a little only."""
        plain, refresh = self._medians()
        share = np.mean(self.refreshed) if self.refreshed else 0.0
        return float((1 - share) * plain + share * refresh)

    @property
    def curvature_share(self) -> float:
        """The share of the time that went into estimating curvature."""
        plain, _ = self._medians()
        return max(0.0, 1 - plain / self.step_seconds) if any(self.refreshed) else 0.0

    @property
    def win_rate(self) -> float | None:
        """The share of coordinates that were not clipped, averaged over the run."""
        rates = [r["win_rate"] for r in self.records if "win_rate" in r]
        return float(np.mean(rates)) if rates else None

    def _medians(self) -> tuple[float, float]:
        seconds, refreshed = np.array(self.seconds), np.array(self.refreshed, bool)
        plain = float(np.median(seconds[~refreshed])) if (~refreshed).any() else 0.0
        return plain, float(np.median(seconds[refreshed])) if refreshed.any() else plain


def check(config: TrainConfig, device_mesh: Mesh) -> None:
    """Tells the user of batches that cannot be cut as asked."""
    if config.attention == "cudnn" and device_mesh.devices.flat[0].platform != "gpu":
        raise UsageError("--attention cudnn needs an NVIDIA GPU. Leave it out.")
    shards = mesh.batch_shards(device_mesh)
    sizes = {
        f"--batch-size {config.batch_size} over --accumulate {config.accumulate}": (
            config.batch_size,
            config.accumulate * shards,
        ),
        f"--curvature-batch {curvature_size(config)}": (curvature_size(config), shards),
    }
    if config.batch_size % jax.process_count():
        raise UsageError(
            f"--batch-size {config.batch_size} does not divide over {jax.process_count()} "
            "processes. Choose a multiple."
        )
    for what, (size, parts) in sizes.items():
        if size < 1 or size % parts:
            raise UsageError(
                f"{what} does not divide over {shards} device(s). Choose a multiple of {parts}."
            )
    if config.batch_size % curvature_size(config):
        raise UsageError(
            f"--curvature-batch {curvature_size(config)} does not divide --batch-size "
            f"{config.batch_size}. Choose a divisor."
        )


class Store(Protocol):
    """Where a run is kept: `checkpoint.Checkpoints`, or nowhere."""

    def save(self, step: int, state: TrainState, batches: dict[str, Any]) -> None:
        """Keeps the state after `step` steps."""
        ...

    def restore(self, abstract_state: TrainState) -> tuple[int, TrainState, dict[str, Any]]:
        """Returns what was kept last."""
        ...


def fit(
    config: TrainConfig,
    corpus: data.Corpus,
    *,
    split: str = "validation",
    device_mesh: Mesh | None = None,
    log: Callable[[dict[str, float]], None] = lambda record: None,
    store: Store | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Trains one model and validates it on the way.

    Args:
      config: the run.
      corpus: its text.
      split: the part of the corpus to validate on.
      device_mesh: the devices; all of them, as `config.mesh` says, if left out.
      log: called with each line of metrics, a step late, so that the device never waits.
      store: where the state is saved to, and resumed from if `config.resume`.
      stop: asked after each step; once true, the state is saved and the run ends.

    Returns:
      Losses and times.
    """
    device_mesh = device_mesh or mesh.make_mesh(config.mesh)
    check(config, device_mesh)
    trainer = Trainer(config, device_mesh, corpus.vocab_size)
    context = trainer.model.context
    batches = data.batches(
        corpus.train,
        context,
        config.batch_size,
        config.seed,
        jax.process_index(),
        jax.process_count(),
    )
    rows = mesh.local_rows(config.batch_size)
    held_out = data.evaluation(
        getattr(corpus, split), context, config.batch_size, config.eval_batches
    )
    held_out = [mesh.global_batch(batch[rows], device_mesh) for batch in held_out]

    start, state = 0, None
    if store and config.resume:
        start, state, position = store.restore(trainer.abstract_sharded_state())
        batches.set_state(position)
    state = state or trainer.init()
    result = Result([], [], [], float("nan"), start)

    def record(line: dict[str, float]) -> None:
        result.records.append(line)
        log(line)

    def validate(step: int, state: TrainState) -> float:
        losses = [trainer.evaluate(state.params, batch) for batch in held_out]
        loss = float(np.mean(jax.device_get(losses)))
        record({"step": step, "val_loss": loss})
        return loss

    def report(step: int, metrics: Metrics, started: float) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        seconds = time.perf_counter() - started
        if step > start:
            result.seconds.append(seconds)
            result.refreshed.append(trainer.refreshes_at(step))
        if step % config.log_interval == 0 or step == config.steps - 1:
            speed = config.batch_size * context / seconds
            record({"step": step, **values, "tokens_per_second": speed})

    late: Metrics | None = None
    clock = time.perf_counter()
    for step in range(start, config.steps):
        batch = mesh.global_batch(next(batches), device_mesh)
        state, metrics = trainer.step(state, batch, step)
        if late is not None:
            report(step - 1, late, clock)
            clock = time.perf_counter()
        late = metrics
        done, stopping = step + 1, stop()
        at_end = done == config.steps or stopping
        validating = done % config.eval_interval == 0 or done == config.steps
        saving = store and (done % config.save_interval == 0 or at_end)
        if validating or saving or at_end:
            report(step, late, clock)
            late = None
            if validating and not stopping:
                result.validation_loss = validate(done, state)
            if store and saving:
                store.save(done, state, batches.get_state())
            clock = time.perf_counter()
        result.steps = done
        if stopping:
            break
    return result
