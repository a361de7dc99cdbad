"""The likelihoods that `gauss_newton_bartlett` samples from.

Each is one prediction's distribution p(y | z) with natural outputs z, and H = -∇_z² log p(y | z):

    categorical   y one of V classes, z the logits [..., V]   H = diag(p) - p pᵀ,  p = softmax(z)
    bernoulli     y 0 or 1, z a logit [...]                   H = p (1 - p),       p = sigmoid(z)
    gaussian      y real, z its mean [...], unit variance     H = 1

Two ways to draw a vector with mean zero and covariance H:

    sample_residual   the gradient of -log p(y | z) at a label y drawn from the model. This is
                      Gauss-Newton-Bartlett, the paper's Sophia-G.
    sample_factor     S s, with S Sᵀ = H and random signs s: curvature propagation (Martens,
                      Sutskever and Swersky 2012, arXiv 1206.6464). For the softmax
                      S = diag(√p) - p √pᵀ, as S Sᵀ = diag(p) - 2 p pᵀ + p pᵀ.

Expectation and cost are the same. A rare class is rarely drawn as a label, and then has a residual
near one. A factor has a value near √p for it every time.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sophia_optax import _arrays


@dataclasses.dataclass(frozen=True)
class Categorical:
    """Softmax over the last axis: the likelihood of cross-entropy with integer labels."""

    event_ndim: int = 1

    def sample_residual(
        self, key: PRNGKeyArray, logits: Float[Array, "*batch V"], /
    ) -> Float[Array, "*batch V"]:
        """Returns softmax(z) - onehot(ŷ), ŷ = argmax(z + Gumbel noise).

        Scores are compared with their maximum instead of indexed by argmax. If the classes are
        sharded, that communicates one number per prediction, and the one-hot array stays sharded.
        (Two classes tie once in about a million draws, and then both count. Without the shift, the
        rounding of large logits would hide the noise.)
        """
        sharding = _arrays.explicit_sharding(logits)
        gumbel = jax.random.gumbel(key, logits.shape, logits.dtype, out_sharding=sharding)
        shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
        scores = shifted + gumbel
        one_hot = scores == jnp.max(scores, axis=-1, keepdims=True)
        odds = jnp.exp(shifted)
        return odds / jnp.sum(odds, axis=-1, keepdims=True) - one_hot.astype(logits.dtype)

    def sample_factor(
        self, key: PRNGKeyArray, logits: Float[Array, "*batch V"], /
    ) -> Float[Array, "*batch V"]:
        """Returns √p ⊙ s - p (√p · s)."""
        p = jax.nn.softmax(logits)
        root = jnp.sqrt(p) * _arrays.random_signs(key, logits)
        return root - p * jnp.sum(root, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """A sigmoid of every element: the likelihood of binary cross-entropy with logits."""

    event_ndim: int = 0

    def sample_residual(
        self, key: PRNGKeyArray, logits: Float[Array, "..."], /
    ) -> Float[Array, "..."]:
        """Returns sigmoid(z) - ŷ with ŷ in {0, 1}."""
        p = jax.nn.sigmoid(logits)
        sharding = _arrays.explicit_sharding(logits)
        uniform = jax.random.uniform(key, logits.shape, logits.dtype, out_sharding=sharding)
        return p - (uniform < p).astype(logits.dtype)

    def sample_factor(
        self, key: PRNGKeyArray, logits: Float[Array, "..."], /
    ) -> Float[Array, "..."]:
        """Returns √(p (1 - p)) s."""
        variance = jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits)
        return jnp.sqrt(variance) * _arrays.random_signs(key, logits)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """A mean with unit variance for every element: the likelihood of (z - y)² / 2."""

    event_ndim: int = 0

    def sample_residual(
        self, key: PRNGKeyArray, means: Float[Array, "..."], /
    ) -> Float[Array, "..."]:
        """Returns z - ŷ, a standard normal whatever z is."""
        return _arrays.random_normal(key, means)

    def sample_factor(
        self, key: PRNGKeyArray, means: Float[Array, "..."], /
    ) -> Float[Array, "..."]:
        """Returns s, random signs."""
        return _arrays.random_signs(key, means)


categorical = Categorical()
bernoulli = Bernoulli()
gaussian = Gaussian()
