"""A γ that follows from a target: the share of coordinates that are to take their own step.

With r = |m| / (ρ h), a coordinate is unclipped where r < γ, so the γ that leaves a share s of them
unclipped is the s-quantile of r. Where noise dominates, |m| / h goes as 1 / sqrt(batch size), so no
fixed γ carries from one batch size to another; its quantile does.

A refresh counts, in one pass, how many coordinates would be unclipped at each rung of a ladder of
γs around the last one, and interpolates. That takes no sort and holds no array: the counts are a
single reduction with an output for each rung. (Compiled by XLA for TPU v5e and for CPU: each array
read once, no temporary; a sum for each rung on its own read them 8 times over on the TPU, and held
all the comparisons on the CPU; a bisection held a copy of m.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sophia_optax import _checks
from sophia_optax._types import Scalar

RUNGS = tuple(4.0**exponent for exponent in range(-10, 11))
"""The γs that are tried, in units of the last one."""


@dataclass(frozen=True)
class WinRateTarget:
    """What `win_rate_target` returns: pass it as `gamma`.

    Attributes:
      target: the share of coordinates to leave unclipped, in (0, 1).
      per_tensor: whether each parameter has a γ of its own.
      decay: of the average of log γ over the refreshes, in [0, 1).
    """

    target: Scalar
    per_tensor: bool
    decay: Scalar


def win_rate_target(
    target: Scalar = 0.5, *, per_tensor: bool = True, decay: Scalar = 0.5
) -> WinRateTarget:
    """Makes the win rate the hyperparameter, in place of γ.

    At each refresh γ is set so that a share `target` of the coordinates whose curvature is positive
    take their own step, m / (γ h), and the others that of the clip. (Where the curvature is zero,
    or negative with `absolute_curvature=False`, no γ could.) Each parameter has a γ of its own,
    unless `per_tensor=False` asks for one that all of them share. γ is then averaged with those
    before, in the logarithm. It is kept in the state, and `diagnostics(state).gamma` shows it, or
    the geometric mean over the coordinates.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sophia_optax
      >>> loss_fn = lambda x: jnp.sum(jnp.arange(1.0, 11.0) * x**2)
      >>> tx = sophia_optax.sophia_h(0.01, gamma=sophia_optax.win_rate_target(0.4))
      >>> @jax.jit
      ... def train_step(x, state):
      ...     hessian_fn = sophia_optax.hutchinson(loss_fn, x)
      ...     updates, state = tx.update(jax.grad(loss_fn)(x), state, x, hessian_fn=hessian_fn)
      ...     return optax.apply_updates(x, updates), state
      >>> x = jnp.arange(1.0, 11.0)
      >>> state = tx.init(x)
      >>> x, state = train_step(x, state)
      >>> print(f"{sophia_optax.diagnostics(state).win_rate:.1f}")
      0.4

    Args:
      target: the share of coordinates to leave unclipped, in (0, 1). Default: what served models
        and batches of several sizes alike in `benchmarks/self_tuning_gamma.py`; it is the upper end
        of the range that the paper tunes γ for.
      per_tensor: whether each parameter meets the target with a γ of its own, in place of all of
        them together with one. Layers that are stacked in one array are one parameter. Default: as
        for `target`.
      decay: of the average of log γ over the refreshes, in [0, 1); 0 takes each γ as it is found.

    Returns:
      What `gamma` takes in `sophia_h`, `sophia_g` and `scale_by_sophia`.

    Raises:
      TypeError: if an argument is not a number.
      ValueError: if an argument is out of its range.
    """
    _checks.check_number("target", target, 0, 1, "(0, 1)")
    _checks.check_number("decay", decay, 0, 1, "[0, 1)")
    if not isinstance(per_tensor, bool):
        raise TypeError(f"per_tensor is {per_tensor!r}. Pass True or False.")
    return WinRateTarget(target, per_tensor, decay)


def unclipped_counts(
    momentum: Float[Array, "..."], bounds: Float[Array, "..."]
) -> Float[Array, " counts"]:
    """Counts the coordinates of one parameter that each rung would leave unclipped.

    Args:
      momentum: |m|.
      bounds: ρ h times the last γ, of the same shape.

    Returns:
      A count for each rung, and how many coordinates have a positive bound.
    """
    # One reduction with many outputs; XLA would not fuse as many sums of their own.
    kinds = [momentum < rung * bounds for rung in RUNGS] + [bounds > 0]
    operands = [kind.astype(jnp.float32) for kind in kinds]
    zeros = [jnp.zeros((), jnp.float32)] * len(operands)

    def add(left: Sequence[Array], right: Sequence[Array]) -> list[Array]:
        return [x + y for x, y in zip(left, right, strict=True)]

    return jnp.stack(jax.lax.reduce(operands, zeros, add, tuple(range(momentum.ndim))))


def next_gamma(
    target: WinRateTarget,
    gamma: Float[Array, ""],
    counts: Float[Array, " counts"],
    refreshes: Int[Array, ""],
) -> Float[Array, ""]:
    """The γ to use from a refresh on.

    Args:
      target: what it is to meet.
      gamma: the last γ.
      counts: `unclipped_counts` with the last γ, or their sum over several parameters.
      refreshes: how many there have been, this one included.

    Returns:
      The γ that meets the target, averaged with those before.
    """
    found = quantile(gamma, counts, target.target)
    return averaged(gamma, found, refreshes, target.decay)


def quantile(
    gamma: Float[Array, ""], counts: Float[Array, " counts"], target: Scalar
) -> Float[Array, ""]:
    """Interpolates the γ that meets the target; the last one if no curvature is positive.

    Args:
      gamma: the last γ, which the rungs are multiples of.
      counts: the sum of `unclipped_counts` over the params.
      target: the share to leave unclipped.

    Returns:
      γ, within the ladder.
    """
    # The logit of a distribution over log γ is closer to a line than its share is.
    *unclipped, positive = counts
    shares = jnp.clip(jnp.stack(unclipped) / jnp.maximum(positive, 1.0), 1e-6, 1 - 1e-6)
    goal = jax.scipy.special.logit(jnp.float32(target))
    found = jnp.exp(jnp.interp(goal, jax.scipy.special.logit(shares), jnp.log(jnp.array(RUNGS))))
    return jnp.where(positive > 0, gamma * found, gamma)


def averaged(
    gamma: Float[Array, ""], found: Float[Array, ""], refreshes: Int[Array, ""], decay: Scalar
) -> Float[Array, ""]:
    """Moves the average of log γ, corrected for its start: the first γ counts in full.

    Args:
      gamma: the average so far.
      found: the γ of this refresh.
      refreshes: how many there have been, this one included.
      decay: of the average.

    Returns:
      The new average.
    """
    weight = (1 - decay) / (1 - decay ** jnp.float32(refreshes))
    return gamma * (found / gamma) ** weight


def check_clip(clip_threshold: Scalar | None) -> None:
    """Checks that there is a clip for the target to be a share of.

    Args:
      clip_threshold: as passed to the optimizer.

    Raises:
      ValueError: if there is none.
    """
    if clip_threshold is None:
        raise ValueError(
            "gamma is a win_rate_target, but clip_threshold is None, so that no coordinate is ever "
            "clipped. Pass a number as gamma, or a clip_threshold."
        )
