"""What sets γ: a number, or a target for the share of coordinates that take their own step.

With r = |m| / (ρ h), a coordinate is unclipped where r < γ, so the γ that leaves a share s of them
unclipped is the s-quantile of r. Where noise dominates, |m| / h goes as 1 / sqrt(batch size), so no
fixed γ carries from one batch size to another; its quantile does.

A refresh counts, in one pass, how many coordinates each of several trial γs around the last one
would leave unclipped, and interpolates. That takes no sort and holds no array: the counts are a
single reduction with an output for each trial. (Compiled by XLA for TPU v5e and for CPU: each array
is read once, without a temporary. A sum for each trial read them 8 times over on the TPU, and held
all the comparisons on the CPU; a bisection held a copy of m.)

A leaf of up to `SMALL` elements is counted by two reductions over an array of all the comparisons.
XLA for CPU compiles that in a fifth of the time, and adds the counts of sharded leaves in one
all-reduce, while it gathers each output of the reduction with many.

Weighted by the momentum, the counts are sums of m², which keep γ from being set by the many
coordinates that hardly move. A first pass finds the largest |m|, so that no square overflows. XLA
for CPU adds floats one by one, so a refresh takes longer there than with counts.

Only coordinates with a momentum and with positive curvature count: no γ changes the step of the
others. A parameter without any keeps its γ, and so does one whose whole gradient is zero: γ would
follow the momentum down as it decays, and keep the steps as large as they were.

γ stays within `SMALLEST_GAMMA` and `LARGEST_GAMMA`, so that a gradient that all but vanishes does
not drive it to zero, from where no factor brings it back. A refresh moves γ by
TRIAL_FACTORS[-1] ** (1 - decay) at most, a factor of 1000 by default: ten refreshes from the
smallest γ to 1.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from sophia_optax import _arrays, _checks, _manual_axes
from sophia_optax._types import Params, Scalar

TRIAL_FACTORS = tuple(4.0**exponent for exponent in range(-10, 11))
"""The γs that a refresh tries, in units of the last one."""

SMALLEST_GAMMA, LARGEST_GAMMA = 2.0**-100, 2.0**100

_SCHEDULED = (
    "optax.inject_hyperparams(lambda {name}: sophia_h(..., "
    "gamma=win_rate_target({name}={name})))({name}=schedule)"
)

SMALL = 1024
"""Elements up to which a leaf is counted by kernels that are small, instead of fast."""

Scale = Callable[[Any], Any]
Ratios = Callable[[], Iterable[tuple[Array, Array, Array]]]
"""Computes |m|, ρ h and g of each owned leaf: a coordinate is unclipped where |m| < γ ρ h."""


def same(gamma: Any) -> Any:
    """γ as it is."""
    return gamma


@runtime_checkable
class GammaControl(Protocol):
    """A rule for γ, whose state is one array: `ScaleBySophiaState.gamma`.

    `leaves` are the positions of the owned leaves among the leaves of `mu`.
    """

    def init(self, params: Params) -> Float[Array, "..."]:
        """Returns the state before the first step."""
        ...

    def gammas(
        self, state: Float[Array, "..."], leaves: Sequence[int], scale: Scale = same
    ) -> list[Any]:
        """Returns scale(γ) for each owned leaf; `scale` is elementwise, and computed once."""
        ...

    def refreshed(
        self,
        state: Float[Array, "..."],
        leaves: Sequence[int],
        ratios: Ratios,
        refreshes: Int[Array, ""],
    ) -> Float[Array, "..."]:
        """Returns the state after a refresh, the `refreshes`-th."""
        ...

    def recorded(self, state: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the state after a step, with the γ that it used."""
        ...


@dataclass(frozen=True)
class FixedGamma:
    """A γ that is given: a number, or an array that may be traced, as on a schedule.

    Attributes:
      gamma: γ.
    """

    gamma: Any

    def init(self, params: Params) -> Float[Array, ""]:
        """Returns γ, in a buffer of its own."""
        return self.recorded(params)

    def gammas(self, state: Any, leaves: Sequence[int], scale: Scale = same) -> list[Any]:
        """Returns scale(γ) for each leaf."""
        return [scale(self.gamma)] * len(leaves)

    def refreshed(
        self, state: Any, leaves: Sequence[int], ratios: Ratios, refreshes: Any
    ) -> Float[Array, ""]:
        """Returns the state as it is."""
        return state

    def recorded(self, state: Any) -> Float[Array, ""]:
        """Returns γ, in a buffer of its own."""
        return jnp.array(self.gamma, jnp.float32)


@dataclass(frozen=True)
class WinRateTarget:
    """What `win_rate_target` returns: pass it as `gamma`.

    Attributes:
      target: the share of coordinates to leave unclipped, in (0, 1).
      per_tensor: whether each parameter has a γ of its own.
      decay: of the average of log γ over the refreshes, in [0, 1).
      weighted: whether a coordinate counts by the square of its momentum.
    """

    target: Scalar
    per_tensor: bool
    decay: Scalar
    weighted: bool

    def init(self, params: Params) -> Float[Array, "..."]:
        """Returns ones: a γ for each leaf, or one."""
        return jnp.ones(len(jax.tree.leaves(params)) if self.per_tensor else (), jnp.float32)

    def gammas(
        self, state: Float[Array, "..."], leaves: Sequence[int], scale: Scale = same
    ) -> list[Any]:
        """Returns scale(γ) for each leaf.

        Args:
          state: as in `GammaControl`.
          leaves: as in `GammaControl`.
          scale: as in `GammaControl`.

        Returns:
          As many.

        Raises:
          ValueError: if the state is that of a γ of another kind.
        """
        if jnp.ndim(state) != self.per_tensor:
            needed = "jnp.ones(n) for n parameters" if self.per_tensor else "jnp.ones(())"
            raise ValueError(
                f"The optimizer's state has a gamma of shape {jnp.shape(state)}, but per_tensor is "
                f"{self.per_tensor} in this win_rate_target: the state is that of another gamma. "
                f"To go on with it, let a target begin anew: optax.tree.set(state, gamma={needed})."
            )
        if not self.per_tensor:
            return [scale(state)] * len(leaves)
        scaled = _arrays.numbers(scale(state))
        return [scaled[leaf] for leaf in leaves]

    def refreshed(
        self,
        state: Float[Array, "..."],
        leaves: Sequence[int],
        ratios: Ratios,
        refreshes: Int[Array, ""],
    ) -> Float[Array, "..."]:
        """Returns the γs that meet the target, averaged with those before."""
        if not leaves:
            return state
        gammas, parts = self.gammas(state, leaves), list(ratios())
        scales = self.weight_scales(parts) if self.weighted else [None] * len(parts)
        counts = _manual_axes.sums_of_all_shards(
            [
                unclipped_counts(m, h, gamma, g, scale)
                for (m, h, g), gamma, scale in zip(parts, gammas, scales, strict=True)
            ]
        ).astype(jnp.float32)
        if not self.per_tensor:
            return next_gammas(self, state[None], counts.sum(axis=0)[None], refreshes)[0]
        if len(leaves) == state.size:
            return next_gammas(self, state, counts, refreshes)
        places = jnp.array(leaves)
        return state.at[places].set(next_gammas(self, state[places], counts, refreshes))

    def weight_scales(self, parts: list[tuple[Array, Array, Array]]) -> list[Float[Array, ""]]:
        """Returns what each |m| is divided by before its square: the largest one that counts."""
        # Not the comparison that the counts make: XLA would keep its result for them.
        largest = _manual_axes.maxima_of_all_shards(
            [jnp.max(jnp.where(jnp.minimum(m, h) > 0, m, 0), initial=0) for m, h, _ in parts]
        )
        return _arrays.numbers(largest) if self.per_tensor else [jnp.max(largest)] * len(parts)

    def recorded(self, state: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the state as it is."""
        return state


def win_rate_target(
    target: Scalar = 0.5,
    *,
    per_tensor: bool = True,
    decay: Scalar = 0.5,
    weighted: bool = False,
) -> WinRateTarget:
    """Makes the win rate the hyperparameter instead of γ.

    At each refresh γ is set so that a share `target` of the coordinates whose curvature is positive
    take their own step, m / (γ h), and the others that of the clip. (Where the momentum or the
    curvature is zero, or the curvature negative with `absolute_curvature=False`, no γ changes the
    step, and the coordinate does not count.) Each parameter has a γ of its own,
    unless `per_tensor=False` asks for one that all of them share. γ is then averaged with those
    before, in the logarithm, and kept between 2⁻¹⁰⁰ and 2¹⁰⁰. It is in the state:
    `diagnostics(state).gamma` is γ, or the geometric mean over the coordinates.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sophia_optax
      >>> loss_fn = lambda x: jnp.sum(jnp.arange(1.0, 21.0) * x**2)
      >>> tx = sophia_optax.sophia_h(0.01, gamma=sophia_optax.win_rate_target(0.4))
      >>> @jax.jit
      ... def train_step(x, state):
      ...     hessian_fn = sophia_optax.hutchinson(loss_fn, x)
      ...     updates, state = tx.update(jax.grad(loss_fn)(x), state, x, hessian_fn=hessian_fn)
      ...     return optax.apply_updates(x, updates), state
      >>> x = jnp.arange(1.0, 21.0)
      >>> state = tx.init(x)
      >>> x, state = train_step(x, state)
      >>> print(f"{sophia_optax.diagnostics(state).win_rate:.1f}")
      0.4

    Args:
      target: the share of coordinates to leave unclipped, in (0, 1). Default: what served models
        and batches of several sizes alike in `benchmarks/self_tuning_gamma.py`; it is the upper end
        of the range that the paper tunes γ for.
      per_tensor: whether each parameter meets the target with a γ of its own, instead of all of
        them together with one. Layers that are stacked in one array are one parameter. Default: as
        for `target`.
      decay: of the average of log γ over the refreshes, in [0, 1); 0 takes each γ as it is found.
      weighted: whether a coordinate counts by the square of its momentum instead of once, so that
        `target` is a share of the squared norm of the momentum. Where few coordinates have most of
        the momentum, as the frequent tokens of a large vocabulary do, the many others do not set γ
        then. Default: as for `target`; `sophia_g` has True, the better one in
        `benchmarks/defaults.py`.

    Returns:
      What `gamma` takes in `sophia_h`, `sophia_g` and `scale_by_sophia`.

    Raises:
      TypeError: if an argument is not a number.
      ValueError: if an argument is out of its range.
    """
    _checks.check_number("target", target, 0, 1, "(0, 1)", _SCHEDULED)
    _checks.check_number("decay", decay, 0, 1, "[0, 1)", _SCHEDULED)
    _checks.check_flag("per_tensor", per_tensor)
    _checks.check_flag("weighted", weighted)
    return WinRateTarget(
        _arrays.hyperparameter(target), per_tensor, _arrays.hyperparameter(decay), weighted
    )


@jax.jit  # Traced once for all leaves of a shape.
def unclipped_counts(
    momentum: Float[Array, "..."],
    curvature: Float[Array, "..."],
    gamma: Scalar = 1.0,
    gradient: Float[Array, "..."] | None = None,
    weight_scale: Float[Array, ""] | None = None,
) -> UInt32[Array, " counts"] | Float[Array, " counts"]:
    """Counts the coordinates of one parameter that each trial γ would leave unclipped.

    Args:
      momentum: |m|.
      curvature: ρ h, of the same shape.
      gamma: the last γ, which the trials are multiples of.
      gradient: g, of the same shape; None stands for one that is nowhere zero.
      weight_scale: the |m| of a coordinate that counts once; the others count by (|m| / it)². None
        counts each coordinate once.

    Returns:
      A count for each trial; how many coordinates have a gradient; and how many count at all, those
      with a momentum and with a curvature that is positive.
    """
    # h is compared with zero, not γ h, which underflows for a γ that has to rise.
    counts = (momentum > 0) & (curvature > 0)
    moving = counts if gradient is None else gradient != 0
    weight: Any = counts.astype(jnp.uint32)
    if weight_scale is not None:
        # Nothing is derived through γ, as nothing is through whole numbers.
        momentum, scale = jax.lax.stop_gradient((momentum, weight_scale))
        ratio = momentum / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
        weight = jnp.where(counts, jnp.where(momentum < scale, ratio, 1.0) ** 2, 0.0)
    axes = tuple(range(momentum.ndim))
    if momentum.size <= SMALL:
        trials = jnp.array(TRIAL_FACTORS, jnp.float32) * gamma
        bounds = jnp.expand_dims(trials, [axis + 1 for axis in axes]) * curvature
        kinds = [
            jnp.where(momentum < bounds, weight, 0),
            jnp.stack([moving.astype(weight.dtype), weight]),
        ]
        behind = tuple(axis + 1 for axis in axes)
        return jnp.concatenate([kind.sum(behind, dtype=weight.dtype) for kind in kinds])
    # One reduction with many outputs; XLA would not fuse as many sums of their own. Counts are
    # whole numbers, as XLA for CPU adds ones in order, and 2²⁴ + 1 = 2²⁴ in float32. Weights are
    # added along some axes and then along the others, so that no sum has that many.
    kinds = [
        jnp.where(momentum < factor * gamma * curvature, weight, 0) for factor in TRIAL_FACTORS
    ]
    operands = [*kinds, moving.astype(weight.dtype), weight]
    zeros = [jnp.zeros((), weight.dtype)] * len(operands)

    def add(left: Sequence[Array], right: Sequence[Array]) -> list[Array]:
        return [x + y for x, y in zip(left, right, strict=True)]

    if weight_scale is None:
        return jnp.stack(jax.lax.reduce(operands, zeros, add, axes))
    kept = closest_to_half(momentum.shape)
    sums = jax.lax.reduce(operands, zeros, add, tuple(axis for axis in axes if axis != kept))
    return jnp.stack(sums).reshape(len(operands), -1).sum(axis=1)


def closest_to_half(shape: tuple[int, ...]) -> int | None:
    """The axis that cuts an array into the most equal number of parts and size of a part.

    Returns:
      None where that is worse than no cut: a part for each element holds as much as the array.
    """
    size = math.prod(shape)
    cuts = [(max(length, size // length), length, axis) for axis, length in enumerate(shape)]
    _, length, axis = min(cuts)
    return axis if length**2 <= 4 * size else None


def next_gammas(
    target: WinRateTarget,
    gammas: Float[Array, " n"],
    counts: Float[Array, "n counts"],
    refreshes: Int[Array, ""],
) -> Float[Array, " n"]:
    """The γs to use from a refresh on.

    Args:
      target: what they are to meet.
      gammas: the last γs.
      counts: `unclipped_counts` for each of them.
      refreshes: how many there have been, this one included.

    Returns:
      The γs that meet the target, averaged with those before.
    """
    factors = quantile_factors(counts, target.target)
    # The average of log γ, corrected for its start: the first γ counts in full.
    decay = jnp.asarray(target.decay, jnp.float32)
    weight = (1 - decay) / (1 - decay ** jnp.float32(refreshes))
    return jnp.clip(gammas * factors**weight, SMALLEST_GAMMA, LARGEST_GAMMA)


def quantile_factors(counts: Float[Array, "n counts"], target: Scalar) -> Float[Array, " n"]:
    """Interpolates what to multiply each γ by to meet the target; 1 where nothing tells.

    Args:
      counts: `unclipped_counts` for each γ.
      target: the share to leave unclipped.

    Returns:
      Factors within the range of `TRIAL_FACTORS`.
    """
    # The logit of a distribution over log γ is closer to a line than its share is.
    unclipped, moving, counted = counts[:, :-2], counts[:, -2], counts[:, -1:]
    shares = jnp.clip(unclipped / jnp.maximum(counted, 1.0), 1e-6, 1 - 1e-6)
    goal = jax.scipy.special.logit(jnp.float32(target))
    logs = jnp.log(jnp.array(TRIAL_FACTORS, jnp.float32))
    found = jax.vmap(lambda x: jnp.interp(goal, x, logs))(jax.scipy.special.logit(shares))
    return jnp.where((counted[:, 0] > 0) & (moving > 0), jnp.exp(found), 1.0)


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
