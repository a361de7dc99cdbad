"""Images and their spelled-out captions: a contrastive loss, which couples the whole batch.

Two towers take an image of a digit and its caption, character by character, to unit vectors. With
z_ij = s ⟨image_i, caption_j⟩ over the B pairs of a batch, s > 0 learnt, the loss (InfoNCE) is

    L = ½ · mean_i CE(z_i·, i) + ½ · mean_j CE(z_·j, j)

What that means for the curvature:

1. The outputs are the logits z [B, B], and the predictions their B rows and their B columns, each a
   softmax over the batch: which caption is this image's, which image is this caption's. L is the
   mean over 2B of them, so `gauss_newton_bartlett` gets both, [2, B, B], as `categorical`. Rows and
   columns share their logits but sample labels independently, so in the square of the pulled-back
   residual the terms of two predictions have mean zero, and the estimate is exact in expectation
   for the Gauss-Newton matrix of L, both directions included. By hand, ĥ = 2B ĝ ⊙ ĝ: the factor
   counts pairs, twice, and neither pixels nor characters.
2. A batch's part is another loss. Among n pairs an image has n - 1 wrong captions, not B - 1; a
   mean over parts does not tend to the whole. A language model's loss is a mean over sequences, so
   `curvature_batch` costs it only noise. Here, both estimators get the whole batch. (What is
   unbiased is a part of the predictions among all B candidates: `weights` of one for some rows and
   columns and zero for the others. It saves nothing, as all pairs go through the towers.)
3. Two of a batch's images may show the same digit, and each other's captions are then right, not
   wrong: with ten captions and a batch of 64, six of them. The logit of such a pair, off the
   diagonal, is -inf. Its probability is zero, in the loss, in what the estimator draws and in what
   it pulls back, so neither estimator needs to be told.
4. `weights` do the other half. A pair that is only padding must neither predict (weight 0 for its
   row and its column) nor be predicted (-inf in the other rows and columns). With the weight
   only, it is still a wrong answer for all others; with -inf only, its own row is in the mean.
5. For Hutchinson, weights and masks are in the loss. Where the two estimators differ is in what
   Gauss-Newton leaves out, Σ ∂L/∂z ∇²z: for log s, in which z is exponential, the exact second
   derivative turns negative where a larger s would still help; Gauss-Newton's cannot.

The held-out score is what such a model is for: which of the ten captions an image's is.

`python -m examples.contrastive` trains with each optimizer of `examples.vision`. A tuned comparison
over several seeds is `benchmarks/digits.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import sophia_optax
from examples import vision
from examples.vision import Batch, Params, Task

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = " abcdefghijklmnopqrstuvwxyz"
LENGTH = max(map(len, WORDS))
FEATURES = 16  # of the space that images and captions share


def characters(words: tuple[str, ...]) -> jax.Array:
    """One-hot letters [N, LENGTH, 27], spaces at the end."""
    indices = [[LETTERS.index(letter) for letter in word.ljust(LENGTH)] for word in words]
    return jax.nn.one_hot(np.array(indices), len(LETTERS))


CAPTIONS = characters(WORDS)


class Towers(nnx.Module):
    """An image's and a caption's transformer, and how sharp their similarity is."""

    def __init__(self, rngs: nnx.Rngs):
        self.image = vision.Transformer(16, vision.PATCH**2, FEATURES, rngs)
        self.caption = vision.Transformer(LENGTH, len(LETTERS), FEATURES, rngs)
        self.log_scale = nnx.Param(jnp.log(5.0))

    def similarity(self, images_BxHxW: jax.Array, captions_KxLxC: jax.Array) -> jax.Array:
        """The logits [B, K] of all pairs."""
        images = normalized(self.image(vision.patches(images_BxHxW)))
        captions = normalized(self.caption(captions_KxLxC))
        return jnp.exp(self.log_scale[...]) * images @ captions.T


def normalized(x: jax.Array) -> jax.Array:
    """Vectors of length one."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def directions(
    logits_BxB: jax.Array, labels_B: jax.Array, weights_B: jax.Array | None = None
) -> jax.Array:
    """The predictions of a batch of pairs: its rows and its columns, [2, B, B].

    Args:
      logits_BxB: images by captions.
      labels_B: equal where two captions are, so that neither is wrong for the other's image.
      weights_B: zero for pairs that are padding; None if there are none.

    Returns:
      The logits, -inf where a pair is not a candidate.
    """
    count = len(labels_B)
    excluded = labels_B[:, None] == labels_B[None, :]
    if weights_B is not None:
        excluded |= (weights_B == 0)[:, None] | (weights_B == 0)[None, :]
    excluded &= ~jnp.eye(count, dtype=bool)
    masked = jnp.where(excluded, -jnp.inf, logits_BxB)
    return jnp.stack([masked, masked.T])


def contrastive_loss(predictions_2xBxB: jax.Array, weights_B: jax.Array | None = None) -> jax.Array:
    """The weighted mean over both directions of a cross-entropy with the diagonal as labels."""
    labels = jnp.broadcast_to(jnp.arange(predictions_2xBxB.shape[-1]), predictions_2xBxB.shape[:-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(predictions_2xBxB, labels)
    return jnp.average(losses.mean(axis=0), weights=weights_B)


def captions() -> Task:
    """Which caption goes with which image."""
    init, model = vision.functional(Towers)

    def outputs(params: Params, batch: Batch) -> jax.Array:
        similarity = model(params).similarity(batch["images"], CAPTIONS)
        # The caption's tower runs once for each of the ten words, not for each pair.
        return directions(similarity[:, batch["labels"]], batch["labels"])

    def loss(params: Params, batch: Batch) -> jax.Array:
        return contrastive_loss(outputs(params, batch))

    def scores(params: Params, batch: Batch) -> dict[str, Any]:
        logits = model(params).similarity(batch["images"], CAPTIONS)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        right = jnp.argmax(logits, axis=-1) == batch["labels"]
        return {"loss": losses.mean(), "accuracy": right.mean()}

    return Task(init, loss, outputs, sophia_optax.categorical, scores)


if __name__ == "__main__":
    vision.main({"captions": captions})
