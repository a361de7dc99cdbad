"""The contracts of the library, written once.

Two of them are what users implement: `HessianFn`, to bring their own curvature, and `Likelihood`,
to bring their own output distribution to `gauss_newton_bartlett`.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

Scalar: TypeAlias = ArrayLike
"""A hyperparameter: a real number, or a scalar array, which may be traced."""

Params: TypeAlias = PyTree[Any]
"""A pytree of parameters. Leaves that are not floating point have no curvature."""

LossFn: TypeAlias = Callable[[Any], Float[Array, ""]]
"""Params to the scalar loss, on a batch that the function closes over."""

OutputsFn: TypeAlias = Callable[[Any], PyTree[Float[Array, "..."]]]
"""Params to the model's outputs (logits, or means), on a batch that the function closes over."""

HeadFn: TypeAlias = Callable[[Any, Any], PyTree[Float[Array, "..."]]]
"""Params and a part of what comes before the last layer to that part's outputs."""


@runtime_checkable
class Coordinates(Protocol):
    """A linear, orthogonal change of coordinates of the params, as `in_eigenbasis` makes one.

    Both methods take and return trees with the structure and shapes of the whole params. Leaves
    that keep their own axes come back as they are.
    """

    def turn(self, tree: Params, /) -> Params:
        """Takes a tree from the params' own axes into these coordinates."""
        ...

    def back(self, tree: Params, /) -> Params:
        """Takes a tree from these coordinates into the params' own axes."""
        ...


@runtime_checkable
class HessianFn(Protocol):
    """A function that draws an estimate of the Hessian's diagonal.

    The transform calls it inside `lax.cond`, on every `update_interval`-th step only. It closes
    over the whole params and over a batch. That is why it works under `optax.masked` and
    `optax.partition`, where the transform itself sees only the params that it owns.

    Under `in_eigenbasis` it is called as `hessian_fn(key, coordinates=coordinates)`, and returns
    the diagonal of the Hessian in these `Coordinates`. With θ = back(θ'), that is
    u' ⊙ turn(H back(u')) for random signs u', and turn(g) ⊙ turn(g) for a g with E[g gᵀ] = H. An
    estimator that does not take the keyword works in the params' own axes only.
    """

    def __call__(self, key: PRNGKeyArray, /) -> Params:
        """Draws one estimate.

        Args:
          key: a typed PRNG key, another one at every call.

        Returns:
          A pytree with the structure and shapes of the whole params, floating point. A leaf that is
          not differentiable has zeros.
        """
        ...


@runtime_checkable
class Likelihood(Protocol):
    """The distribution p(y | outputs) that a loss is the mean negative log of.

    `gauss_newton_bartlett` calls one of the two methods with outputs of at least float32. Both must
    return a random array like the outputs, independent over predictions, with mean zero and, within
    a prediction, the covariance H = -∇² log p(y | outputs) (for a likelihood whose Hessian depends
    on y: its expectation, the Fisher information of the outputs).

    Attributes:
      event_ndim: how many trailing axes of the outputs make up one prediction: 1 for the logits of
        a softmax, 0 where every element is a prediction of its own.
    """

    @property
    def event_ndim(self) -> int:
        """How many trailing axes of the outputs make up one prediction."""
        ...

    def sample_residual(
        self, key: PRNGKeyArray, outputs: Float[Array, "..."], /
    ) -> Float[Array, "..."]:
        """Draws y ~ p(· | outputs) and returns the gradient of -log p(y | outputs)."""
        ...

    def sample_factor(
        self, key: PRNGKeyArray, outputs: Float[Array, "..."], /
    ) -> Float[Array, "..."]:
        """Returns S s for random signs s and a matrix S with S Sᵀ = H."""
        ...
