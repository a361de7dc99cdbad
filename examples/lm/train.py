"""The training step, compiled for a mesh."""

import copy
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import sophia_optax

from . import hosts, mesh, optimizers
from .model import Transformer, compute_dtype
from .run import Run

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that a step changes."""

    step: jax.Array
    params: nnx.State
    opt_state: optax.OptState


def few_layers_on_cpu(run: Run) -> bool:
    """Whether a loop over the layers costs more than it saves.

    A step of the tiny model, of two layers, is faster without the loop and takes no longer to
    compile. That of the model of five layers is not faster and takes longer to compile.
    """
    return run.mesh.devices.flat[0].platform == "cpu" and run.model.layers <= 2


def microbatches(batch_BxL: jax.Array, count: int) -> jax.Array:
    """Cuts a batch into `[count, B / count, L]`, each part spread over all the devices."""
    return batch_BxL.reshape(-1, count, batch_BxL.shape[-1]).swapaxes(0, 1)


class Trainer:
    """The compiled functions of one run, or of several that differ in their hyperparameters.

    Attributes:
      run: what is trained.
      traced: whether hyperparameters and the number of steps are arguments of the compiled step,
        so that `at` gives trainers for other values without compiling again.
      unroll: whether the layers are compiled one by one instead of as a loop; decided by
        `few_layers_on_cpu` if left out.
      init: (seed) -> TrainState, every array born in its sharding; the run's seed if left out.
      evaluate: (params, windows [B, L + 1]) -> the mean loss, a scalar, without dropout.
    """

    def __init__(self, run: Run, *, traced: bool = False, unroll: bool | None = None):
        self.run, self.traced = run, traced
        self.unroll = few_layers_on_cpu(run) if unroll is None else unroll
        self.point = traced_values(run) if traced else {}
        self.dtype = compute_dtype(run.mesh.devices.flat[0].platform)
        self.structure = nnx.split(self.abstract_model(), nnx.Param)[0]
        # cuDNN's kernel has no derivative of its derivative; XLA's attention has.
        self.forward = optimizers.Forward(
            self.logits, functools.partial(self.loss, attention="xla")
        )
        self.abstract_state = jax.eval_shape(self.new_state)
        self.is_sophia = has_sophia(self.abstract_state.opt_state)
        self.shardings = mesh.shardings(run.mesh, self.abstract_state)
        batch, replicated = mesh.batch_sharding(run.mesh), mesh.replicated(run.mesh)
        self.init = jax.jit(self.new_state, out_shardings=self.shardings)
        self.evaluate = jax.jit(
            self.loss, in_shardings=(self.shardings.params, batch), out_shardings=replicated
        )
        self._step = jax.jit(
            self.train_step,
            static_argnums=(3, 4),
            donate_argnums=0,
            in_shardings=(self.shardings, batch, replicated),
            out_shardings=(self.shardings, replicated),
        )

    def at(self, run: Run) -> "Trainer":
        """This trainer for a run with another seed and, if traced, steps and hyperparameters."""
        other = copy.copy(self)
        other.run, other.point = run, traced_values(run) if self.traced else {}
        return other

    def abstract_model(self) -> Transformer:
        """The model's structure, without its numbers."""
        return nnx.eval_shape(lambda: Transformer(self.run.model, nnx.Rngs(0)))

    def optimizer(
        self, point: dict[str, jax.Array]
    ) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
        """The transformation and the schedule, at traced values or at the run's own."""
        given = dict(point)
        steps = given.pop("steps", self.run.config.steps)
        given.pop("seed", None)
        h = dataclasses.replace(self.run.hyperparameters, **given)
        stacks = mesh.stack_sharding(self.run.mesh)
        return optimizers.build(self.run.optimizer, h, steps, stacks)

    def new_state(self, seed: Any = None) -> TrainState:
        """The state before the first step."""
        key = jax.random.key(self.run.config.seed if seed is None else seed)
        params = nnx.state(Transformer(self.run.model, nnx.Rngs(params=key)), nnx.Param)
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer({})[0].init(params))

    def lower(
        self,
        state: TrainState,
        batch: jax.Array,
        refresh: bool | None,
        refresh_basis: bool | None = None,
    ) -> Any:
        """The step before compilation, for shapes instead of arrays."""
        return self._step.lower(state, batch, self.point, refresh, refresh_basis)

    def abstract_sharded_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state: what a checkpoint is read into."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.abstract_state,
            self.shardings,
        )

    def logits(
        self,
        params: nnx.State,
        tokens_BxL: jax.Array,
        attention: str | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The model as a function of its params; with a key, with dropout."""
        # So that gradients are laid out as the params, whatever sharding the optimizer wants next:
        # else the compiler sums whole gradients over the devices.
        params = jax.lax.with_sharding_constraint(params, self.shardings.params)
        return nnx.merge(self.structure, params)(
            tokens_BxL,
            dtype=self.dtype,
            attention=attention or self.run.config.attention,
            remat=self.run.config.remat,
            unroll=self.unroll,
            mesh=self.run.mesh,
            dropout_rate=self.run.config.dropout,
            key=key,
        )

    def loss(
        self,
        params: nnx.State,
        batch_BxL: jax.Array,
        attention: str | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Mean nats a token."""
        logits_BxLxV = self.logits(params, batch_BxL[:, :-1], attention, key)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV, batch_BxL[:, 1:])
        return losses.mean()

    def loss_and_gradient(
        self, params: nnx.State, batch_BxL: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """The batch's, by way of its microbatches, one in memory at a time."""
        gradient, count = jax.value_and_grad(self.loss), self.run.config.accumulate
        if count == 1:
            return gradient(params, batch_BxL, key=key)

        def add(total: Any, part: tuple[jax.Array, jax.Array | None]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, part[0], key=part[1])), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        keys = None if key is None else jax.random.split(key, count)
        total, _ = jax.lax.scan(add, zeros, (microbatches(batch_BxL, count), keys))
        return jax.tree.map(lambda x: x / count, total)

    def dropout_key(self, step: jax.Array, point: dict[str, jax.Array]) -> jax.Array | None:
        """The key of a step's dropout, so that a resumed run drops what it would have dropped."""
        if not self.run.config.dropout:
            return None
        return jax.random.fold_in(jax.random.key(point.get("seed", self.run.config.seed)), step)

    def train_step(
        self,
        state: TrainState,
        batch_BxL: jax.Array,
        point: dict[str, jax.Array],
        refresh: bool | None = None,
        refresh_basis: bool | None = None,
    ) -> tuple[TrainState, Metrics]:
        """One step of the optimizer, with one curvature estimate where it is due.

        Args:
          state: changed by the step.
          batch_BxL: windows.
          point: hyperparameters, the number of steps and the seed; the run's own where left out.
          refresh: whether the curvature is estimated; None decides on the device.
          refresh_basis: whether an eigenbasis is refreshed; None decides on the device.
        """
        tx, schedule = self.optimizer(point)
        key = self.dropout_key(state.step, point)
        loss, grads = self.loss_and_gradient(state.params, batch_BxL, key)
        extra_args: dict[str, Any] = {}
        if self.run.optimizer.curvature:
            part = sophia_optax.curvature_batch(batch_BxL, self.run.curvature_batch)
            estimator = self.run.optimizer.curvature.estimator
            hessian_fn = estimator(self.forward, state.params, part)
            extra_args = {"hessian_fn": hessian_fn, "refresh": refresh}
        if refresh_basis is not None:
            extra_args["refresh_basis"] = refresh_basis
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra_args)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
            **self.diagnostics(opt_state),
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    def diagnostics(self, opt_state: optax.OptState) -> Metrics:
        """What the optimizer's state says about the run."""
        if not self.is_sophia:
            return {}
        found = sophia_optax.diagnostics(opt_state)
        return {"win_rate": found.win_rate, "gamma": found.gamma}

    def refreshes_at(self, step: int) -> bool:
        """Whether that step estimates the curvature."""
        interval = self.run.hyperparameters.update_interval
        return self.run.optimizer.curvature is not None and step % interval == 0

    def step(self, state: TrainState, batch: jax.Array, number: int) -> tuple[TrainState, Metrics]:
        """The compiled step; `number` is the state's own, known here without asking the device."""
        # With the arguments of `lower`, one for one: then what that has traced is not traced again.
        return self._step(state, batch, self.point, self.program_at(number), None)

    def program_at(self, step: int) -> bool | None:
        """Which of the programs that a run compiles takes that step: `refresh` of `train_step`."""
        on_host = self.run.config.refresh == "host" and self.is_sophia
        return self.refreshes_at(step) if on_host else None

    def compile_with_the_others(self, state: TrainState, batch: jax.Array) -> None:
        """Where there are several processes, has all of them compile before one of them steps."""
        if jax.process_count() == 1:
            return
        for refresh in {self.program_at(0), self.program_at(1)}:
            self.lower(state, batch, refresh).compile()
        self.evaluate.lower(state.params, batch).compile()
        hosts.meet()


def states_of(kind: type, opt_state: optax.OptState) -> list[Any]:
    """The states of a kind in an optimizer's state."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def has_sophia(opt_state: optax.OptState) -> bool:
    """Whether an optimizer's state has the library's in it."""
    return bool(states_of(sophia_optax.ScaleBySophiaState, opt_state))


def traced_values(run: Run) -> dict[str, jax.Array]:
    """What may change without another compilation: hyperparameters, the number of steps, the seed.

    The seed is dropout's.
    """
    values = vars(run.hyperparameters) | {"steps": run.config.steps}
    del values["update_interval"]  # the host decides by it
    seed = {"seed": jnp.uint32(run.config.seed)} if run.config.dropout else {}
    given = {name: jnp.float32(value) for name, value in values.items() if value is not None}
    return given | seed
