"""A decoder-only transformer, GPT-2's, in Flax NNX: one block's code, scanned over the layers.

Names end in their axes: B batch, L length, D width, H heads, K features of a head, F hidden
features, V vocabulary. Params are float32; `compute_dtype` is what they are multiplied in.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from .config import ModelConfig
from .mesh import constrain


def compute_dtype(platform: str | None = None) -> DTypeLike:
    """bfloat16 where the hardware has it."""
    return jnp.float32 if (platform or jax.default_backend()) == "cpu" else jnp.bfloat16


def normal(rngs: nnx.Rngs, scale: float, **axes: int) -> nnx.Param:
    """A parameter drawn from N(0, scale²); the keywords name its axes and give their sizes."""
    value = scale * jax.random.normal(rngs.params(), tuple(axes.values()))
    return nnx.Param(value, axes=tuple(axes))


def constant(fill: float, **axes: int) -> nnx.Param:
    """A parameter that starts at `fill`."""
    return nnx.Param(jnp.full(tuple(axes.values()), fill, jnp.float32), axes=tuple(axes))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Sets a share of the features to 0 and scales the others up; without a key, x."""
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0.0).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Zero mean and unit variance over the features, computed in float32, then an affine map."""

    def __init__(self, **axes: int):
        self.scale = constant(1.0, **axes)
        self.bias = constant(0.0, **axes)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        x = x_BxLxD.astype(jnp.float32)
        mean = x.mean(axis=-1, keepdims=True)
        variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
        normalized = (x - mean) * jax.lax.rsqrt(variance + 1e-5)
        return (normalized * self.scale[...] + self.bias[...]).astype(x_BxLxD.dtype)


class Block(nnx.Module):
    """All the blocks at once: each parameter has the layers as its first axis.

    Calling it needs one layer's slice of them; `Transformer` scans over those.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        n, d, h = config.layers, config.width, config.heads
        k, f = d // h, 4 * d
        scale, residual_scale = config.init_scale, config.init_scale / (2 * n) ** 0.5
        heads = {"heads": h, "head_features": k}
        self.norm_1 = LayerNorm(layers=n, embed=d)
        self.qkv = normal(rngs, scale, layers=n, embed=d, qkv=3, **heads)
        self.qkv_bias = constant(0.0, layers=n, qkv=3, **heads)
        self.out = normal(rngs, residual_scale, layers=n, **heads, embed=d)
        self.out_bias = constant(0.0, layers=n, embed=d)
        self.norm_2 = LayerNorm(layers=n, embed=d)
        self.up = normal(rngs, scale, layers=n, embed=d, mlp=f)
        self.up_bias = constant(0.0, layers=n, mlp=f)
        self.down = normal(rngs, residual_scale, layers=n, mlp=f, embed=d)
        self.down_bias = constant(0.0, layers=n, embed=d)

    def __call__(
        self, x_BxLxD: jax.Array, attention: str, rate: float, key: jax.Array | None
    ) -> jax.Array:
        keys = (None, None) if key is None else jax.random.split(key)
        x = x_BxLxD + dropout(self.attend(self.norm_1(x_BxLxD), attention), rate, keys[0])
        return x + dropout(self.mlp(self.norm_2(x)), rate, keys[1])

    def attend(self, x_BxLxD: jax.Array, attention: str) -> jax.Array:
        dtype = x_BxLxD.dtype
        qkv_BxLx3xHxK = jnp.einsum("BLD,DTHK->BLTHK", x_BxLxD, self.qkv[...].astype(dtype))
        qkv_BxLx3xHxK += self.qkv_bias[...].astype(dtype)
        query, key, value = (qkv_BxLx3xHxK[:, :, i] for i in range(3))
        attended_BxLxHxK = jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation=attention
        )
        y_BxLxD = jnp.einsum("BLHK,HKD->BLD", attended_BxLxHxK, self.out[...].astype(dtype))
        return y_BxLxD + self.out_bias[...].astype(dtype)

    def mlp(self, x_BxLxD: jax.Array) -> jax.Array:
        dtype = x_BxLxD.dtype
        hidden_BxLxF = x_BxLxD @ self.up[...].astype(dtype) + self.up_bias[...].astype(dtype)
        hidden_BxLxF = jax.nn.gelu(hidden_BxLxF)
        return hidden_BxLxF @ self.down[...].astype(dtype) + self.down_bias[...].astype(dtype)


class Transformer(nnx.Module):
    """Tokens to logits of the next ones."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        d, scale = config.width, config.init_scale
        self.embedding = normal(rngs, scale, vocab=config.vocab_size, embed=d)
        self.positions = normal(rngs, scale, position=config.context, embed=d)
        self.blocks = Block(config, rngs)
        self.norm = LayerNorm(embed=d)

    def __call__(
        self,
        tokens_BxL: jax.Array,
        *,
        dtype: DTypeLike = jnp.float32,
        attention: str = "xla",
        remat: bool = False,
        unroll: bool = False,
        mesh: Mesh | None = None,
        dropout_rate: float = 0.0,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns float32 logits, `[B, L, V]`: position l sees tokens 0 to l.

        Without a key there is no dropout.
        """
        length = tokens_BxL.shape[1]
        x_BxLxD = self.embedding[...].astype(dtype)[tokens_BxL]
        x_BxLxD += self.positions[...].astype(dtype)[:length]

        structure, layers = nnx.split(self.blocks)
        keys = None
        if key is not None and dropout_rate > 0.0:
            x_BxLxD = dropout(x_BxLxD, dropout_rate, jax.random.fold_in(key, 0))
            keys = jax.random.split(key, self.blocks.norm_1.scale.shape[0])

        def layer(
            x_BxLxD: jax.Array, of_layer: tuple[nnx.State, jax.Array | None]
        ) -> tuple[jax.Array, None]:
            params, key = of_layer
            x_BxLxD = constrain(x_BxLxD, mesh, "batch", "length", "features")
            return nnx.merge(structure, params)(x_BxLxD, attention, dropout_rate, key), None

        step = jax.checkpoint(layer) if remat else layer
        x_BxLxD, _ = jax.lax.scan(step, x_BxLxD, (layers, keys), unroll=unroll)
        x_BxLxD = self.norm(x_BxLxD)
        logits_BxLxV = jnp.einsum(
            "BLD,VD->BLV",
            x_BxLxD,
            self.embedding[...].astype(dtype),
            preferred_element_type=jnp.float32,
        )
        return constrain(logits_BxLxV, mesh, "batch", "length", "vocab")


def parameter_count(config: ModelConfig) -> int:
    """How many numbers the model learns."""
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
