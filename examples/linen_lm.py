"""A language model in Flax Linen with Sophia-G, in one file: the TrainState adapter, sharded.

`python -m examples.linen_lm` trains a small model on the standard library's sources. Its data, its
schedule and the choice of params that decay are those of `examples.lm`.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import sophia_optax
import sophia_optax.linen
from examples.arguments import whole
from examples.lm import data
from examples.lm.optimizers import is_matrix, learning_rate
from examples.lm.run import half

WIDTH, HEADS, LAYERS, CONTEXT = 64, 4, 2, 128


class Transformer(nn.Module):
    """Bytes to logits of the next ones."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(256, WIDTH, embedding_init=nn.initializers.normal(0.06))
        positions = self.param("positions", nn.initializers.normal(0.06), (CONTEXT, WIDTH))
        x = embed(tokens) + positions[: tokens.shape[1]]
        mask = nn.make_causal_mask(tokens)
        for _ in range(LAYERS):
            x += nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x), mask=mask)
            x += nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


def place(mesh: Mesh, state: sophia_optax.linen.TrainState) -> sophia_optax.linen.TrainState:
    """Shards each array's last axis over the devices where they divide it."""
    devices = mesh.size

    def sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        shards = leaf.ndim > 1 and leaf.shape[-1] % devices == 0
        axes = [None] * (leaf.ndim - 1) + ["devices"] if shards else []
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(sharding, state)


def train_step(
    state: sophia_optax.linen.TrainState, windows: jax.Array
) -> tuple[sophia_optax.linen.TrainState, jax.Array]:
    """One step; the curvature sees half of the batch, on every tenth step."""
    inputs, labels = windows[:, :-1], windows[:, 1:]

    def loss_fn(params: dict) -> jax.Array:
        logits = state.apply_fn({"params": params}, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    part = sophia_optax.curvature_batch(inputs, half(len(inputs), jax.device_count()))
    hessian_fn = sophia_optax.gauss_newton_bartlett(
        lambda params: state.apply_fn({"params": params}, part), state.params
    )
    return state.apply_gradients(grads=grads, hessian_fn=hessian_fn), loss


def main(steps: int, batch_size: int) -> list[float]:
    """Trains on all devices and returns the losses."""
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), (AxisType.Auto,))
    corpus = data.load("stdlib")
    batches = data.batches(corpus.train, CONTEXT, batch_size, seed=0)
    model = Transformer()
    schedule = functools.partial(learning_rate, peak=2e-3, warmup=0.2, steps=steps)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        sophia_optax.sophia_g(schedule, weight_decay=0.1, mask=is_matrix),
    )

    def init() -> sophia_optax.linen.TrainState:
        params = model.init(jax.random.key(0), jnp.zeros((1, CONTEXT), jnp.int32))["params"]
        return sophia_optax.linen.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    shardings = place(mesh, jax.eval_shape(init))
    rows = NamedSharding(mesh, PartitionSpec("devices"))
    step = jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, rows),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
    )
    state = jax.jit(init, out_shardings=shardings)()
    losses = []
    for number in range(steps):
        windows = jax.device_put(np.asarray(next(batches)), rows)
        state, loss = step(state, windows)
        losses.append(float(loss))
        if number % 50 == 0 or number == steps - 1:
            win_rate = float(sophia_optax.diagnostics(state.opt_state).win_rate)
            print(f"step {number}: loss {losses[-1]:.3f}, win rate {win_rate:.2f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=whole(1), default=500)
    parser.add_argument("--batch-size", type=whole(1), default=16)
    config = parser.parse_args()
    if config.batch_size % jax.device_count():
        parser.error(f"--batch-size is a multiple of the {jax.device_count()} devices.")
    main(**vars(config))
