"""Sophia's state and update (Liu, Li, Hall, Liang and Ma 2023, arXiv 2305.14342, Algorithm 3).

With t counting from 0, and n the estimates accepted so far:

    m_t = b1 m_{t-1} + (1 - b1) g_t
    if t mod k == 0:   h_t = b2 h_{t-1} + (1 - b2) ĥ(θ_t)        else  h_t = h_{t-1}
    u_t = clip(m_t / max(γ |h_t| / (1 - b2ⁿ), ε), ±ρ)

Differences from the paper:

1. h starts at zero, so after n estimates it is 1 - b2ⁿ of what it should be: a tenth after 100
   steps at k = 10. It is divided by that; `bias_correction=False` gives the paper's.
2. An estimate with a coordinate that is not finite is dropped whole and counted.
3. |h| in place of h: a negative h is mostly noise in Hutchinson's estimates, and in the paper such
   coordinates take the largest step. `absolute_curvature=False` gives the paper's.

Differences from optax.contrib.sophia, besides these:

4. h is refreshed before it is used, as in the paper. That is also the order without copies: XLA
   refreshes h in place, while "use, then refresh" copies h twice and holds one more array.
5. m is not bias-corrected, as in the paper.
6. ε is 1e-12, the paper's, in place of 1e-8; it only keeps the division finite.
7. The estimate comes from a thunk, `hessian_fn(key)`, over the whole params, in place of a loss
   that is called on what params the transform sees; so it works under `masked` and `partition`.
8. h is float32 whatever the params are: an average with b2 = 0.99 does not move in bfloat16.
9. No PRNG key in the state: the key is `fold_in(key(seed), count)`, so that a resumed run draws the
   same probes and every serialiser can save the state.
10. The win rate is in the state, measured at each refresh, in place of a print.

Differences from the authors' PyTorch SophiaG, besides 1, 2, 3, 4 and 9: the batch size is part of
the estimate, not of the optimizer, and ε is a floor, not added.
"""

import math
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from sophia_optax import _arrays, _checks, _trees, _win_rate_target
from sophia_optax._types import HessianFn, Params, Scalar
from sophia_optax._win_rate_target import WinRateTarget

FLOAT32 = jnp.dtype("float32")  # Not jnp.float32: optax.inject_hyperparams calls callables.

Gamma: TypeAlias = Scalar | WinRateTarget
"""γ, or the win rate that it is to follow from."""


class _Curvature(NamedTuple):
    """What a refresh changes."""

    nu: list[Any]
    refreshes: Int[Array, ""]
    rejected: Int[Array, ""]
    win_rate: Float[Array, ""]
    gammas: list[Any]


class ScaleBySophiaState(NamedTuple):
    """The state of `scale_by_sophia`: arrays alone, no two of which share a buffer.

    Attributes:
      count: how many updates there have been, `i32[]`.
      mu: m, the average of the gradients; shapes, shardings and dtypes of the params (or
        `mu_dtype`).
      nu: h, the average of the curvature before bias correction; shapes and shardings of the
        params, float32 (or `nu_dtype`).
      refreshes: how many estimates have been averaged into `nu`, `i32[]`.
      rejected: how many estimates were dropped as not finite, `i32[]`.
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
    b1: Scalar = 0.965,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-12,
    gamma: Gamma = 0.01,
    clip_threshold: Scalar | None = 1.0,
    update_interval: Scalar = 10,
    *,
    bias_correction: bool = True,
    absolute_curvature: bool = True,
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
      b1: decay of m, in [0, 1). Default: the authors' code's; the paper has 0.96.
      b2: decay of h, in [0, 1), at each estimate. Default: the paper's.
      eps: floor of the denominator, above 0. Where γ |h| is smaller, the step is a sign step.
        Default: the paper's.
      gamma: γ, the scale of h, above 0: the smaller, the more coordinates are clipped. The paper
        tunes it until the win rate is between 0.1 and 0.5. Default: the paper's for Sophia-H; 0.05
        for Sophia-G. Or a `win_rate_target`, from which γ follows.
      clip_threshold: ρ, the largest step of a coordinate, above 0. None does not clip. Default: the
        paper's.
      update_interval: k, an estimate is drawn every k-th step, the first included. Default: the
        paper's.
      bias_correction: whether h is divided by 1 - b2ⁿ. The paper does not.
      absolute_curvature: whether |h| stands in the place of h, so that a coordinate whose h is
        negative, which noise makes of many in Hutchinson's estimates, steps as if it were positive.
        The paper does not: the step is a sign step there. No step is larger with |h|.
        Default: what `benchmarks/lm_race.py` and `benchmarks/warmup.py` found the better.
      mu_dtype: dtype of m; None takes that of each parameter.
      nu_dtype: dtype of h; None takes that of each parameter.
      seed: of the keys that the estimates are drawn with.

    Returns:
      A transformation whose `update` takes two arguments more: `hessian_fn`, a `HessianFn`, and
      `refresh`. With `refresh=None` it decides by `lax.cond` whether an estimate is due; True or
      False fix that when the step is traced, for trainers that compile both and choose on the host
      (and under `vmap`, where `lax.cond` would compute both branches). `params` may be None. The
      updates have the dtypes of the gradients. Leaves that are not floating point get zeros.

    Raises:
      TypeError: if a hyperparameter is a callable or not a number, or a dtype is no floating one.
      ValueError: if a hyperparameter is out of its range.
    """
    _checks.check_number("b1", b1, 0, 1, "[0, 1)")
    _checks.check_number("b2", b2, 0, 1, "[0, 1)")
    _checks.check_number("eps", eps, 0, float("inf"), "(0, ∞)")
    target = gamma if isinstance(gamma, WinRateTarget) else None
    if target is None:
        _checks.check_number("gamma", gamma, 0, float("inf"), "(0, ∞)")
    else:
        _win_rate_target.check_clip(clip_threshold)
    if clip_threshold is not None:
        _checks.check_number("clip_threshold", clip_threshold, 0, float("inf"), "(0, ∞)")
    _checks.check_count("update_interval", update_interval)
    _checks.check_dtype("mu_dtype", mu_dtype)
    _checks.check_dtype("nu_dtype", nu_dtype)

    b1, b2, eps = map(_wide, (b1, b2, eps))
    fixed_gamma = None if target else _wide(gamma)
    clip = None if clip_threshold is None else _wide(clip_threshold)
    log_b2 = _log(b2)

    def momentum(g: Any, m: Array, decay: Any) -> Array:
        return decay * _wide(m) + (1 - b1) * jnp.asarray(g, _wide(m).dtype)

    def scale_of(gamma: Any, refreshes: Int[Array, ""]) -> Any:
        """What h is multiplied by: γ / (1 - b2ⁿ), one number for all coordinates."""
        # 1 - b2ⁿ without the cancellation that costs three digits at b2 = 0.9999.
        share = jnp.where(refreshes == 0, 1.0, -jnp.expm1(refreshes * log_b2))
        return gamma / share if bias_correction else gamma

    def scaled(h: Array, scale: Any) -> Array:
        # |scale h| and not scale |h|: XLA for TPU would have the branch return |h| beside h.
        product = scale * _wide(h)
        return jnp.abs(product) if absolute_curvature else product

    def denominator(h: Array, scale: Any) -> Array:
        return jnp.maximum(scaled(h, scale), eps)

    def first_gamma(params: Params) -> Array:
        if target is None:
            return _as_state(gamma)
        if target.per_tensor:
            return jnp.ones(len(jax.tree.leaves(params)), jnp.float32)
        return jnp.ones((), jnp.float32)

    def init(params: Params) -> ScaleBySophiaState:
        def zeros(dtype: DTypeLike | None) -> PyTree[Array]:
            return jax.tree.map(
                lambda p: _arrays.zeros_like(p, dtype or jnp.result_type(p)), params
            )

        return ScaleBySophiaState(
            count=jnp.zeros((), jnp.int32),
            mu=zeros(mu_dtype),
            nu=zeros(nu_dtype),
            refreshes=jnp.zeros((), jnp.int32),
            rejected=jnp.zeros((), jnp.int32),
            win_rate=jnp.zeros((), jnp.float32),
            gamma=first_gamma(params),
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
        del params, extra_args
        state = cast(ScaleBySophiaState, state)
        _check_update_arguments(hessian_fn, refresh)
        owned = _trees.Owned.of(updates)
        gs, ms, hs = owned.take(updates), owned.take(state.mu), owned.take(state.nu)

        per_tensor = target is not None and target.per_tensor
        places = owned.take(_trees.enumerated(state.mu)) if per_tensor else []
        old_gammas = [state.gamma[place] for place in places] if per_tensor else [state.gamma]

        def for_each(numbers: list[Any]) -> list[Any]:
            """One number for each owned leaf."""
            return numbers if per_tensor else numbers * len(gs)

        def gammas_for(hs: list[Array], refreshes: Int[Array, ""]) -> list[Any]:
            """γ as it was set, or those at which that h meets the target."""
            if target is None:
                return [fixed_gamma]
            bounds = for_each([scale_of(gamma, refreshes) * clip for gamma in old_gammas])
            counts = [
                _win_rate_target.unclipped_counts(jnp.abs(momentum(g, m, b1)), scaled(h, bound))
                for g, m, h, bound in zip(gs, ms, hs, bounds, strict=True)
            ]
            if not per_tensor:
                counts = [sum(counts, start=jnp.zeros(len(_win_rate_target.RUNGS) + 1))]
            return [
                _win_rate_target.next_gamma(target, gamma, count, refreshes)
                for gamma, count in zip(old_gammas, counts, strict=True)
            ]

        def refreshed() -> _Curvature:
            """Averages a new estimate into h, unless a coordinate of it is not finite."""
            assert hessian_fn is not None
            key = jax.random.fold_in(jax.random.key(seed), state.count)
            estimates = owned.take_estimate(hessian_fn(key))
            candidates = [
                (b2 * _wide(h) + (1 - b2) * _wide(e)).astype(h.dtype)
                for h, e in zip(hs, estimates, strict=True)
            ]
            refreshes = _increment(state.refreshes)
            # One sum tells both how many coordinates are not clipped and, by being NaN, that h is
            # not finite somewhere; so a sharded refresh adds a single all-reduce, of a scalar.
            gammas = gammas_for(candidates, refreshes)
            scales = for_each([scale_of(gamma, refreshes) for gamma in gammas])
            unclipped = jnp.zeros((), jnp.float32)
            for g, m, h, scale in zip(gs, ms, candidates, scales, strict=True):
                bound = denominator(h, scale) * (1 if clip is None else clip)
                won = (jnp.abs(momentum(g, m, b1)) < bound).astype(jnp.float32)
                unclipped += jnp.sum(jnp.where(jnp.isfinite(h), won, jnp.nan))
            accepted = ~jnp.isnan(unclipped)
            return _Curvature(
                [jnp.where(accepted, new, old) for new, old in zip(candidates, hs, strict=True)],
                jnp.where(accepted, refreshes, state.refreshes),
                jnp.where(accepted, state.rejected, _increment(state.rejected)),
                jnp.where(accepted, unclipped / max(owned.size, 1), state.win_rate),
                [
                    jnp.where(accepted, _as_state(new), old)
                    for new, old in zip(gammas, old_gammas, strict=True)
                ],
            )

        def kept() -> _Curvature:
            return _Curvature(hs, state.refreshes, state.rejected, state.win_rate, old_gammas)

        if refresh is None:
            due = state.count % jnp.asarray(update_interval, jnp.int32) == 0
            curvature = jax.lax.cond(due, refreshed, kept)
            # Let m wait for the refresh, which reads the old one: XLA for CPU would otherwise write
            # the new m first, and copy the old one for that.
            decay = jnp.where(curvature.refreshes < 0, 0.0, b1)
        else:
            curvature = refreshed() if refresh else kept()
            decay = b1

        gammas: list[Any] = [fixed_gamma] if target is None else curvature.gammas
        scales = for_each([scale_of(gamma, curvature.refreshes) for gamma in gammas])
        ms = [momentum(g, m, decay) for g, m in zip(gs, ms, strict=True)]
        us = [
            m / denominator(h, scale) for m, h, scale in zip(ms, curvature.nu, scales, strict=True)
        ]
        if clip is not None:
            us = [jnp.clip(u, -clip, clip) for u in us]
        new_state = ScaleBySophiaState(
            count=_increment(state.count),
            mu=owned.put(ms, state.mu),
            nu=owned.put(curvature.nu, state.nu),
            refreshes=curvature.refreshes,
            rejected=curvature.rejected,
            win_rate=curvature.win_rate,
            gamma=_put(gammas, places, state.gamma) if per_tensor else _as_state(gammas[0]),
        )
        return _trees.like_gradients(owned.put(us, updates), updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _wide(x: Any) -> Any:
    """Widens an array to float32 at least; a Python number adapts by itself."""
    return x.astype(_arrays.at_least_float32(x.dtype)) if isinstance(x, jax.Array) else x


def _log(x: Any) -> Any:
    """The logarithm of an array, or, in double precision, of a Python number; -inf for zero."""
    if isinstance(x, jax.Array):
        return jnp.log(x)
    return math.log(x) if x > 0 else -math.inf


def _as_state(gamma: Any) -> Float[Array, ""]:
    """γ as the state holds it: in a buffer of its own."""
    return jnp.array(gamma, jnp.float32)


def _put(values: list[Array], places: list[int], array: Float[Array, " n"]) -> Float[Array, " n"]:
    """Sets some elements of an array."""
    return array.at[jnp.array(places)].set(jnp.stack(values)) if values else array


def _increment(count: Int[Array, ""]) -> Int[Array, ""]:
    """Adds one, and stays at the largest integer rather than wrap around."""
    return jnp.asarray(optax.safe_increment(count))


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
            "hessian_fn=sophia_optax.gauss_newton_bartlett(outputs_fn, params)."
        )
    if hessian_fn is not None and not callable(hessian_fn):
        raise TypeError(
            f"hessian_fn is a {type(hessian_fn).__name__}, but it must be callable with a PRNG "
            "key. Pass the function, not its result."
        )
