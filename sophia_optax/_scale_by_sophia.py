"""Sophia's state and update (Liu, Li, Hall, Liang and Ma 2023, arXiv 2305.14342, Algorithm 3).

With t counting from 0, and n the estimates accepted so far:

    m_t = b1 m_{t-1} + (1 - b1) g_t
    if t mod k == 0:   h_t = b2 h_{t-1} + (1 - b2) ĥ(θ_t)        else  h_t = h_{t-1}
    u_t = clip(m_t / max(γ |h_t| / (1 - b2ⁿ), ε), ±ρ)

Differences from the paper:

1. h starts at zero, so after n estimates it is 1 - b2ⁿ of what it should be: a tenth after 100
   steps at k = 10. It is divided by that; `bias_correction=False` gives the paper's.
2. An estimate with a coordinate that is not finite is dropped whole and counted.
3. |h| instead of h: a negative h is mostly noise in Hutchinson's estimates, and in the paper such
   coordinates take the largest step. `absolute_curvature=False` gives the paper's.

Differences from optax.contrib.sophia, besides these:

4. h is refreshed before it is used, as in the paper. That is also the order without copies: XLA
   refreshes h in place, while "use, then refresh" copies h twice and holds one more array.
5. m is not bias-corrected, as in the paper.
6. ε is 1e-12, the paper's, instead of 1e-8; it only keeps the division finite.
7. The estimate comes from a thunk, `hessian_fn(key)`, over the whole params, instead of a loss
   that is called on the params that the transform sees. So it works under `masked` and `partition`.
8. h is float32 whatever the params are: an average with b2 = 0.99 does not move in bfloat16.
9. No PRNG key in the state: the key is `fold_in(key(seed), count)`, so that a resumed run draws the
   same probes and every serialiser can save the state.
10. The win rate is in the state, measured at each refresh, instead of a print.

Differences from the authors' PyTorch SophiaG, besides 1, 2, 3, 4 and 9: the batch size is part of
the estimate, not of the optimizer, and ε is a floor, not added.
"""

import dataclasses
import math
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from sophia_optax import _arrays, _checks, _manual_axes, _trees, _win_rate_target
from sophia_optax._types import HessianFn, Params, Scalar
from sophia_optax._win_rate_target import FixedGamma, GammaControl, WinRateTarget

FLOAT32 = jnp.dtype("float32")  # Not jnp.float32: optax.inject_hyperparams calls callables.


@dataclasses.dataclass(frozen=True)
class SophiaRule:
    """The equations of one step, as functions of arrays: one method each, in their order.

    They are elementwise, so that they hold in any coordinates. `m`, `h` and `g` are arrays of one
    parameter; what is computed from them is float32, or wider where they are.

    Attributes:
      b1: decay of m.
      b2: decay of h, at each estimate.
      eps: ε, the floor of the denominator.
      clip_threshold: ρ, or None.
      bias_correction: whether h is divided by 1 - b2ⁿ.
      absolute_curvature: whether |h| is used instead of h.
      nesterov: whether the step looks one gradient ahead of m.
      max_estimate_ratio: how much larger than h an estimate may be, or None.
    """

    b1: Any
    b2: Any
    eps: Any
    clip_threshold: Any
    bias_correction: bool = True
    absolute_curvature: bool = True
    nesterov: bool = False
    max_estimate_ratio: Any = None

    def momentum(self, m: Array, g: Array, decay: Any = None) -> Array:
        """m_t = b1 m_{t-1} + (1 - b1) g_t; `decay` is b1, where a caller has to make it depend."""
        m = _arrays.widen(m)
        return (self.b1 if decay is None else decay) * m + (1 - self.b1) * jnp.asarray(g, m.dtype)

    def lookahead(self, m: Array, g: Array) -> Array:
        """The momentum that the step takes: m_t, or b1 m_t + (1 - b1) g_t with Nesterov's."""
        return self.momentum(m, g) if self.nesterov else m

    def curvature(self, h: Array, estimate: Array) -> Array:
        """h_t = b2 h_{t-1} + (1 - b2) ĥ, in the dtype of h."""
        average = self.b2 * _arrays.widen(h) + (1 - self.b2) * _arrays.widen(estimate)
        return average.astype(h.dtype)

    def scale(self, gamma: Any, refreshes: Int[Array, ""]) -> Any:
        """γ / (1 - b2ⁿ), one number for all coordinates: h starts at zero and lacks that much."""
        if not self.bias_correction:
            return gamma
        share = _arrays.one_minus_power(self.b2, refreshes)
        return gamma / jnp.where(refreshes == 0, 1.0, share)

    def sizes(self, h: Array, estimate: Array) -> Float[Array, "2"]:
        """Σ |ĥ| and Σ |h|, by which an estimate is found too large."""
        return jnp.stack([jnp.sum(jnp.abs(_arrays.widen(x))) for x in (estimate, h)])

    def is_too_large(self, sizes: Float[Array, "2"], refreshes: Int[Array, ""]) -> Any:
        """Whether Σ |ĥ| is above `max_estimate_ratio` Σ |h| / (1 - b2ⁿ), and h is not zero."""
        share = _arrays.one_minus_power(self.b2, refreshes)
        # Multiplied by the share, which is zero before the first refresh.
        return (sizes[1] > 0) & (share * sizes[0] > self.max_estimate_ratio * sizes[1])

    def scaled_curvature(self, h: Array, scale: Any) -> Array:
        """γ |h_t| / (1 - b2ⁿ)."""
        # |scale h| and not scale |h|: XLA for TPU would have the branch return |h| beside h.
        product = scale * _arrays.widen(h)
        return jnp.abs(product) if self.absolute_curvature else product

    def denominator(self, h: Array, scale: Any) -> Array:
        """max(γ |h_t| / (1 - b2ⁿ), ε)."""
        return jnp.maximum(self.scaled_curvature(h, scale), self.eps)

    def largest_unclipped(self, h: Array, scale: Any) -> Array:
        """The momentum from which on a coordinate is clipped."""
        bound = self.denominator(h, scale)
        return bound if self.clip_threshold is None else self.clip_threshold * bound

    def step(self, m: Array, h: Array, scale: Any) -> Array:
        """u_t = clip(m_t / max(γ |h_t| / (1 - b2ⁿ), ε), ±ρ); NaN where m is not finite."""
        u = m / self.denominator(h, scale)
        if self.clip_threshold is None:
            return u
        # Clipped, an infinite momentum would look like any other for the rest of the run.
        u = jnp.clip(u, -self.clip_threshold, self.clip_threshold)
        return jnp.where(jnp.isfinite(m), u, jnp.nan)


Gamma: TypeAlias = Scalar | WinRateTarget
"""γ, or the win rate that it is to follow from."""


class ScaleBySophiaState(NamedTuple):
    """The state of `scale_by_sophia`: arrays alone, no two of which share a buffer.

    Attributes:
      count: how many updates there have been, `i32[]`.
      mu: m, the average of the gradients; shapes, shardings and dtypes of the params (or
        `mu_dtype`).
      nu: h, the average of the curvature before bias correction; shapes and shardings of the
        params, float32 (or `nu_dtype`).
      refreshes: how many estimates have been averaged into `nu`, `i32[]`.
      rejected: how many estimates were dropped as not finite or too large, `i32[]`.
      win_rate: the share of coordinates that were not clipped, at the last accepted refresh,
        `f32[]` in [0, 1].
      gamma: γ of the last update, `f32[]`; with a `win_rate_target`, that of the last accepted
        refresh; where that is per tensor, `f32[n]`, one for each of the n leaves of `mu`.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: PyTree[Any]
    nu: PyTree[Any]
    refreshes: Int[Array, ""]
    rejected: Int[Array, ""]
    win_rate: Float[Array, ""]
    gamma: Float[Array, "..."]


def scale_by_sophia(
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-12,
    gamma: Gamma = 0.02,
    clip_threshold: Scalar | None = 1.0,
    update_interval: Scalar = 10,
    *,
    bias_correction: bool = True,
    absolute_curvature: bool = True,
    nesterov: bool = False,
    max_estimate_ratio: Scalar | None = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = FLOAT32,
    seed: Scalar = 0,
) -> optax.GradientTransformationExtraArgs:
    """Divides the momentum by an average of the Hessian's diagonal and clips each coordinate.

    `sophia_h` and `sophia_g` are this with weight decay and a learning rate.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sophia_optax
      >>> loss_fn = lambda x: jnp.sum(jnp.array([1.0, 100.0]) * x**2)
      >>> tx = optax.chain(sophia_optax.scale_by_sophia(b1=0.8, gamma=1.0), optax.scale(-0.1))
      >>> @jax.jit
      ... def train_step(x, state):
      ...     loss, grads = jax.value_and_grad(loss_fn)(x)
      ...     hessian_fn = sophia_optax.hutchinson(loss_fn, x)
      ...     updates, state = tx.update(grads, state, x, hessian_fn=hessian_fn)
      ...     return optax.apply_updates(x, updates), state, loss
      >>> x = jnp.ones(2)
      >>> state = tx.init(x)
      >>> for step in range(41):
      ...     x, state, loss = train_step(x, state)
      ...     if step % 10 == 0:
      ...         print(f"{loss:.2f}")
      101.00
      21.07
      0.31
      0.09
      0.03

    Args:
      b1: decay of m, in [0, 1). Default: for short runs, the better one in
        `benchmarks/defaults.py`; the paper has 0.96.
      b2: decay of h, in [0, 1), at each estimate. Default: the paper's.
      eps: floor of the denominator, above 0. Where γ |h| is smaller, the step is a sign step.
        Default: the paper's.
      gamma: γ, the scale of h, above 0: the smaller, the more coordinates are clipped. The paper
        tunes it until the win rate is between 0.1 and 0.5. Or a `win_rate_target`,
        from which γ follows. Default: for Sophia-H, the better one in `benchmarks/defaults.py`; the
        paper has 0.01 for Sophia-H and 0.05 for Sophia-G.
      clip_threshold: ρ, the largest step of a coordinate, above 0. None does not clip. Default: the
        paper's.
      update_interval: k, an estimate is drawn every k-th step, the first included. Default: the
        paper's.
      bias_correction: whether h is divided by 1 - b2ⁿ. The paper does not.
      absolute_curvature: whether the denominator uses |h| instead of h. Noise makes many of
        Hutchinson's estimates negative. The paper takes a sign step there. No step is larger with
        |h|. Default: the better one in `benchmarks/lm_race.py` and `benchmarks/warmup.py`.
      nesterov: whether the step looks one gradient ahead of m: b1 m + (1 - b1) g instead of m. The
        paper does not.
      max_estimate_ratio: the largest estimate to accept, in multiples of h, at least 1: one whose
        mean |ĥ| over all coordinates is more than this times the mean |h| / (1 - b2ⁿ) is dropped
        and counted as `rejected`. One that is finite but absurd otherwise stays in h for b2's
        memory: after one that is 1e6 times too large, steps are below half of their size for 917
        refreshes. 100 leaves room for noise. The first estimate is always accepted, and so is any
        while h is zero. Where the curvature really grows by that much between two refreshes, none
        is accepted any more, so watch `rejected`. Default: None, no limit, as in the paper.
      mu_dtype: dtype of m; None takes that of each parameter.
      nu_dtype: dtype of h; None takes that of each parameter.
      seed: of the keys that the estimates are drawn with.

    Returns:
      A transformation whose `update` also takes `hessian_fn`, a `HessianFn`, and `refresh`. With
      `refresh=None` it decides by `lax.cond` whether an estimate is due; True or False fix that
      when the step is traced, for trainers that compile both and choose on the host (and under
      `vmap`, where `lax.cond` would compute both branches). `params` may be None. Each update has
      the dtype that its gradient and its parameter promote to. Leaves that are not floating point
      get zeros.

    Raises:
      TypeError: if a hyperparameter is a callable, not a number, an array with axes or in half
        precision, a flag is not a boolean, or a dtype is not a floating one.
      ValueError: if a hyperparameter is out of its range.
    """
    for name, value in {"b1": b1, "b2": b2}.items():
        _checks.check_number(name, value, 0, 1, "[0, 1)")
    _checks.check_number("eps", eps, _checks.SMALLEST, math.inf, "[1.2e-38, ∞)")
    if clip_threshold is not None:
        _checks.check_number("clip_threshold", clip_threshold, 0, math.inf, "(0, ∞)")
    if isinstance(gamma, WinRateTarget):
        _win_rate_target.check_clip(clip_threshold)
    else:
        _checks.check_number("gamma", gamma, 0, math.inf, "(0, ∞)")
    if max_estimate_ratio is not None:
        _checks.check_number("max_estimate_ratio", max_estimate_ratio, 1, math.inf, "[1, ∞)")
    _checks.check_interval("update_interval", update_interval)
    flags = {
        "bias_correction": bias_correction,
        "absolute_curvature": absolute_curvature,
        "nesterov": nesterov,
    }
    for name, flag in flags.items():
        _checks.check_flag(name, flag)
    _checks.check_seed(seed)
    _checks.check_dtype("mu_dtype", mu_dtype)
    _checks.check_dtype("nu_dtype", nu_dtype)
    rule = SophiaRule(
        b1=_arrays.hyperparameter(b1),
        b2=_arrays.hyperparameter(b2),
        eps=_arrays.hyperparameter(eps),
        clip_threshold=_arrays.hyperparameter(clip_threshold),
        bias_correction=bias_correction,
        absolute_curvature=absolute_curvature,
        nesterov=nesterov,
        max_estimate_ratio=_arrays.hyperparameter(max_estimate_ratio),
    )
    control = (
        gamma if isinstance(gamma, WinRateTarget) else FixedGamma(_arrays.hyperparameter(gamma))
    )
    return transformation(rule, control, update_interval, mu_dtype, nu_dtype, seed)


def transformation(
    rule: SophiaRule,
    control: GammaControl,
    update_interval: Scalar = 10,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = FLOAT32,
    seed: Scalar = 0,
) -> optax.GradientTransformationExtraArgs:
    """Makes the transformation out of its equations, so that a study can change one of them.

    Args:
      rule: the equations of a step.
      control: what sets γ.
      update_interval: k.
      mu_dtype: dtype of m; None takes that of each parameter.
      nu_dtype: dtype of h; None takes that of each parameter.
      seed: of the keys that the estimates are drawn with.

    Returns:
      A transformation with the state and the `update` of `scale_by_sophia`.
    """

    def init(params: Params) -> ScaleBySophiaState:
        def zeros(dtype: DTypeLike | None) -> PyTree[Array]:
            return jax.tree.map(
                lambda p: _arrays.zeros_like(p, dtype or _arrays.dtype_to_average(p)), params
            )

        return ScaleBySophiaState(
            count=jnp.zeros((), jnp.int32),
            mu=zeros(mu_dtype),
            nu=zeros(nu_dtype),
            refreshes=jnp.zeros((), jnp.int32),
            rejected=jnp.zeros((), jnp.int32),
            win_rate=jnp.zeros((), jnp.float32),
            gamma=control.init(params),
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: Params | None = None,
        *,
        hessian_fn: HessianFn | None = None,
        refresh: bool | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleBySophiaState]:
        del extra_args
        state = cast(ScaleBySophiaState, state)
        _check_update_arguments(hessian_fn, refresh)
        owned = _trees.OwnedLeaves.of(updates)
        gs, old_ms = list(map(jnp.asarray, owned.select(updates))), owned.select_state(state.mu)
        leaves = owned.select(_trees.enumerated(state.mu))
        old = _Curvature(
            owned.select_state(state.nu),
            state.refreshes,
            state.rejected,
            state.win_rate,
            state.gamma,
        )

        def refreshed() -> _Curvature:
            assert hessian_fn is not None
            key = jax.random.fold_in(jax.random.key(seed), state.count)
            _manual_axes.check_reduced(hessian_fn, key)
            estimates = owned.select_estimate(hessian_fn(key))
            momenta = [
                rule.lookahead(rule.momentum(m, g), g) for m, g in zip(old_ms, gs, strict=True)
            ]
            return _refresh(rule, control, old, estimates, momenta, gs, leaves)

        if refresh is None:
            due = state.count % _arrays.whole_interval(update_interval) == 0
            curvature = jax.lax.cond(due, refreshed, lambda: old)
            # Let m wait for the refresh, which reads the old one: XLA for CPU would otherwise write
            # the new m first, and copy the old one for that.
            decay = jnp.where(curvature.refreshes < 0, 0.0, rule.b1)
        else:
            curvature = refreshed() if refresh else old
            decay = rule.b1

        scales = control.gammas(
            curvature.gamma, leaves, lambda gamma: rule.scale(gamma, curvature.refreshes)
        )
        ms = [rule.momentum(m, g, decay) for m, g in zip(old_ms, gs, strict=True)]
        us = [
            rule.step(rule.lookahead(m, g), h, scale)
            for m, g, h, scale in zip(ms, gs, curvature.nu, scales, strict=True)
        ]
        new_state = ScaleBySophiaState(
            count=_arrays.increment(state.count),
            mu=owned.replace(
                state.mu, [m.astype(old.dtype) for m, old in zip(ms, old_ms, strict=True)]
            ),
            nu=owned.replace(state.nu, curvature.nu),
            refreshes=curvature.refreshes,
            rejected=curvature.rejected,
            win_rate=curvature.win_rate,
            gamma=control.recorded(curvature.gamma),
        )
        return _trees.cast_updates(owned.replace(updates, us), updates, params), new_state

    return optax.GradientTransformationExtraArgs(init, update)


class _Curvature(NamedTuple):
    """What a refresh changes."""

    nu: list[Any]
    refreshes: Int[Array, ""]
    rejected: Int[Array, ""]
    win_rate: Float[Array, ""]
    gamma: Float[Array, "..."]


def _refresh(
    rule: SophiaRule,
    control: GammaControl,
    old: _Curvature,
    estimates: list[Array],
    momenta: list[Array],
    gs: list[Array],
    leaves: list[int],
) -> _Curvature:
    """Averages an estimate into h and sets γ, unless h is then not finite, or ĥ is too large.

    Args:
      rule: the equations of a step.
      control: what sets γ.
      old: the curvature before.
      estimates: ĥ, an array for each owned leaf.
      momenta: what the step will take.
      gs: the gradients.
      leaves: the positions of the owned leaves among those of the state.

    Returns:
      The new curvature; or the old one, with the rejection counted.
    """
    hs = [rule.curvature(h, e) for h, e in zip(old.nu, estimates, strict=True)]
    refreshes = _arrays.increment(old.refreshes)

    def ratios() -> list[tuple[Array, Array, Array]]:
        scale = rule.scale(rule.clip_threshold, refreshes)
        return [
            (jnp.abs(m), rule.scaled_curvature(h, scale), g)
            for m, h, g in zip(momenta, hs, gs, strict=True)
        ]

    gamma = control.refreshed(old.gamma, leaves, ratios, refreshes)
    # One sum tells both how many coordinates are not clipped and, by being NaN, that h is not
    # finite somewhere; so a sharded refresh adds a single all-reduce, of a scalar.
    unclipped = [jnp.zeros((), jnp.float32)]
    scales = control.gammas(gamma, leaves, lambda gamma: rule.scale(gamma, refreshes))
    for m, h, scale in zip(momenta, hs, scales, strict=True):
        limit = rule.largest_unclipped(h, scale)
        takes_own_step = (jnp.abs(m) < limit).astype(jnp.float32)
        unclipped.append(jnp.sum(jnp.where(jnp.isfinite(h), takes_own_step, jnp.nan)))
    total = _manual_axes.sum_of_all_shards(unclipped)
    # Of the logarithm, which is NaN where its argument is: XLA for CPU computes a sum of n scalars
    # once more in each of the n choices below, so that at 100 leaves compiling took 4 s instead of
    # 0.8 s, but nothing as dear as a logarithm. (XLA of jax 0.10 drops an optimization barrier.)
    accepted = ~jnp.isnan(jnp.log1p(total))
    if rule.max_estimate_ratio is not None:
        sizes = [rule.sizes(h, e) for h, e in zip(old.nu, estimates, strict=True)]
        total_sizes = _manual_axes.sum_of_all_shards([jnp.zeros(2, jnp.float32), *sizes])
        accepted &= ~rule.is_too_large(total_sizes, old.refreshes)
    # As a float: an integer of more than 32 bits cannot be an operand.
    win_rate = total / float(max(sum(map(_manual_axes.size_on_all_shards, hs)), 1))
    new = _Curvature(hs, refreshes, old.rejected, win_rate, gamma)
    dropped = old._replace(rejected=_arrays.increment(old.rejected))
    return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), new, dropped)


def _check_update_arguments(hessian_fn: HessianFn | None, refresh: bool | None) -> None:
    """Checks what only `update` gets to see.

    Args:
      hessian_fn: as passed to `update`.
      refresh: as passed to `update`.

    Raises:
      TypeError: if one of them is of the wrong kind.
      ValueError: if a refresh may be due and there is no estimator.
    """
    if not (refresh is None or isinstance(refresh, bool)):
        raise TypeError(
            f"refresh is {refresh!r}, but it is chosen when the step is traced. Pass None, True or "
            "False; for jit, name it in static_argnames."
        )
    if hessian_fn is None and refresh is not False:
        raise ValueError(
            "update was called without hessian_fn, so no curvature can be estimated. Pass "
            "hessian_fn=sophia_optax.hutchinson(loss_fn, params) or "
            "hessian_fn=sophia_optax.gauss_newton_bartlett(outputs_fn, params); and inside of a "
            "wrapper that drops keywords (optax.lookahead, optax.contrib.sam, "
            "optax.contrib.split_real_and_imaginary, optax.MultiSteps in another transformation, "
            "Flax's TrainState), wrap optax.GradientTransformation(tx.init, "
            "functools.partial(tx.update, hessian_fn=hessian_fn)) in the step, instead of tx."
        )
    if hessian_fn is not None and not callable(hessian_fn):
        raise TypeError(
            f"hessian_fn is a {type(hessian_fn).__name__}, but it must be callable with a PRNG "
            "key. Pass the function, not its result."
        )
