"""The training step, compiled for a mesh."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

import sophia_optax
from examples.lm import mesh, optimizers
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
        # cuDNN's kernel has no derivative of its derivative; XLA's attention has.
        self.forward = optimizers.Forward(
            self.logits, functools.partial(self.loss, attention="xla")
        )

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

    def logits(
        self, params: nnx.State, tokens_BxL: jax.Array, attention: str | None = None
    ) -> jax.Array:
        """The model as a function of its params."""
        return nnx.merge(self.structure, params)(
            tokens_BxL,
            dtype=self.dtype,
            attention=attention or self.config.attention,
            remat=self.config.remat,
            unroll=self.unroll,
            mesh=self.mesh,
        )

    def loss(
        self, params: nnx.State, batch_BxL: jax.Array, attention: str | None = None
    ) -> jax.Array:
        """Mean nats a token."""
        logits_BxLxV = self.logits(params, batch_BxL[:, :-1], attention)
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
            found = sophia_optax.diagnostics(opt_state)
            metrics |= {"win_rate": found.win_rate, "gamma": found.gamma}
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    def refreshes_at(self, step: int) -> bool:
        """Whether that step estimates the curvature."""
        return self.has_curvature and step % self.config.update_interval == 0

    def step(self, state: TrainState, batch: jax.Array, number: int) -> tuple[TrainState, Metrics]:
        """The compiled step; `number` is the state's own, known here without asking the device."""
        on_host = self.config.refresh == "host" and self.is_sophia
        return self._step(state, batch, self.refreshes_at(number) if on_host else None)


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
