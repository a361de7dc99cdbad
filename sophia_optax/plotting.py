"""Plots of a run: win rate, gamma and curvature by step, and the distribution of h.

Needs matplotlib, a dependency of the extra `plotting`. Each function returns one
`matplotlib.figure.Figure`, to save or to show. It opens no window and does not use pyplot.

The curves come from records: dictionaries with a "step" and numbers, as a training loop logs them.
The names are "win_rate", "gamma" and, for the quantiles of h, "curvature_q10", "curvature_q50" ...:

    record = {"step": step, "win_rate": float(sophia_optax.diagnostics(opt_state).win_rate)}
    record |= sophia_optax.plotting.curvature_quantiles(opt_state)
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import PyTree
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sophia_optax._scale_by_sophia import ScaleBySophiaState

Runs: TypeAlias = Mapping[str, Sequence[Mapping[str, float]]]
"""Records by the name of the run; a record without the plotted number is skipped."""

Group: TypeAlias = Callable[[tuple[Any, ...]], str | None]
"""The path of a parameter, as in `jax.tree_util`, to the name of its group; None leaves it out."""

# The bins that curvature is counted in: all of float32, its subnormal numbers included.
_LOWEST_DECADE, _HIGHEST_DECADE, _BINS_PER_DECADE = -46, 39, 16
_BINS = (_HIGHEST_DECADE - _LOWEST_DECADE) * _BINS_PER_DECADE
_EDGES = 10.0 ** (np.arange(_BINS + 1) / _BINS_PER_DECADE + _LOWEST_DECADE)


def read_metrics(path: str | os.PathLike[str]) -> dict[str, list[dict[str, float]]]:
    """Reads a log with one JSON object per line, as `examples.lm` writes it.

    Args:
      path: the file. Each line has the run's name as "run" and numbers under other names; where
        "run" is missing, the name is "run".

    Returns:
      The records by the name of the run, in the order of the file.
    """
    runs: dict[str, list[dict[str, float]]] = {}
    for line in Path(path).read_text().splitlines():
        record = json.loads(line)
        runs.setdefault(record.pop("run", "run"), []).append(record)
    return runs


def win_rate(runs: Runs) -> Figure:
    """Draws the share of coordinates that are not clipped, by step.

    Example:
      >>> import sophia_optax.plotting
      >>> records = [{"step": 0, "win_rate": 0.1}, {"step": 10, "win_rate": 0.3}]
      >>> figure = sophia_optax.plotting.win_rate({"sophia_g": records})

    Args:
      runs: records with "step" and "win_rate".

    Returns:
      The figure. The range from 0.1 to 0.5, for which the paper tunes gamma, is gray.
    """
    figure, axes = _axes("share of coordinates not clipped", "win rate")
    axes.axhspan(0.1, 0.5, color="gray", alpha=0.15, linewidth=0, label="0.1 to 0.5 (paper)")
    for color, name, steps, values in _curves(runs, "win_rate"):
        axes.plot(steps, values, color=color, label=name)
    axes.set_ylim(0, 1)
    axes.legend()
    return figure


def gamma(runs: Runs) -> Figure:
    """Draws γ by step, for a schedule or a `win_rate_target`.

    Args:
      runs: records with "step" and "gamma".

    Returns:
      The figure, with gamma on a log scale.
    """
    figure, axes = _axes("γ", "gamma")
    for color, name, steps, values in _curves(runs, "gamma"):
        axes.plot(steps, values, color=color, label=name)
    axes.set_yscale("log")
    axes.legend()
    return figure


def curvature(runs: Runs) -> Figure:
    """Draws the quantiles of h, by step: the middle one as a line, the outer ones as a band.

    Args:
      runs: records with "step" and what `curvature_quantiles` returns.

    Returns:
      The figure, with h on a log scale.

    Raises:
      ValueError: if no record has a quantile.
    """
    logged = {key for records in runs.values() for record in records for key in record}
    keys = sorted((key for key in logged if key.startswith("curvature_q")), key=_percent)
    if not keys:
        raise ValueError(
            "No record has a number under 'curvature_q50' or the like. Log what "
            "sophia_optax.plotting.curvature_quantiles(opt_state) returns."
        )
    low, middle, high = keys[0], keys[len(keys) // 2], keys[-1]
    title = f"{_percent(middle):g} % quantile of h, from {_percent(low):g} to {_percent(high):g} %"
    figure, axes = _axes("h", title)
    curves = (_curves(runs, key) for key in (low, middle, high))
    for lower, line, upper in zip(*curves, strict=True):
        color, name, steps, values = line
        axes.fill_between(steps, lower[-1], upper[-1], color=color, alpha=0.2, linewidth=0)
        axes.plot(steps, values, color=color, label=name)
    axes.set_yscale("log")
    axes.legend()
    return figure


def curvature_quantiles(
    opt_state: PyTree[Any], quantiles: Sequence[float] = (0.1, 0.5, 0.9)
) -> dict[str, float]:
    """Computes the quantiles of h in an optimizer state, for a log.

    It copies all of h to the host, one shard after another. Do not call it on every step.

    Example:
      >>> import jax.numpy as jnp, sophia_optax, sophia_optax.plotting
      >>> tx, params = sophia_optax.sophia_h(1e-3, b2=0.0), jnp.ones(3)
      >>> hessian_fn = lambda key: jnp.array([1e-2, 1e-1, 1e4])
      >>> _, state = tx.update(params, tx.init(params), params, hessian_fn=hessian_fn)
      >>> quantiles = sophia_optax.plotting.curvature_quantiles(state, [0.5])
      >>> print(f"{quantiles['curvature_q50']:.1f}")
      0.1

    Args:
      opt_state: as for `curvature_histogram`.
      quantiles: numbers in [0, 1].

    Returns:
      A number for each, to within 7 %, under names such as "curvature_q50"; 0 where the quantile is
      not positive. They are of the stored h, without bias correction.

    Raises:
      ValueError: if there is no state of Sophia.
    """
    spread = sum((_spread(leaf) for _, leaf, _ in _curvature_leaves(opt_state)), _Spread.empty())
    found = {}
    for quantile in quantiles:
        rank = quantile * spread.size - (spread.size - spread.counts.sum())
        place = min(int(np.searchsorted(np.cumsum(spread.counts), rank)), _BINS - 1)
        centre = float(np.sqrt(_EDGES[place] * _EDGES[place + 1]))
        found[f"curvature_q{100 * quantile:g}"] = centre if rank > 0 else 0.0
    return found


def by_path(path: tuple[Any, ...]) -> str:
    """Names a parameter by its path, with one name for all members of a list.

    Example:
      >>> import jax, sophia_optax.plotting
      >>> params = {"layers": [{"bias": 0.0}, {"bias": 0.0}]}
      >>> for path, _ in jax.tree_util.tree_leaves_with_path(params):
      ...     print(sophia_optax.plotting.by_path(path))
      layers.*.bias
      layers.*.bias

    Args:
      path: the parameter's path, as in `jax.tree_util`.

    Returns:
      The keys joined by points, with a star for each number. The attribute `value` of a box such as
      `nnx.Param` is left out.
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return ".".join("*" if name.isdecimal() else name for name in names) or "(root)"


def curvature_histogram(
    opt_state: PyTree[Any], group: Group = by_path, *, b2: float | None = None
) -> Figure:
    """Draws the distribution of h, with a row for each group of parameters.

    Where h spans many decades within a group, no single learning rate suits it. The log scale shows
    positive h only; the label of a row has the share of the others.

    Example:
      >>> import jax.numpy as jnp, optax, sophia_optax, sophia_optax.plotting
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), sophia_optax.sophia_h(1e-3))
      >>> params = {"w": jnp.ones(3), "b": jnp.ones(1)}
      >>> hessian_fn = lambda key: {"w": jnp.array([0.1, 1.0, -1.0]), "b": jnp.array([10.0])}
      >>> _, state = tx.update(params, tx.init(params), params, hessian_fn=hessian_fn)
      >>> figure = sophia_optax.plotting.curvature_histogram(state)

    Args:
      opt_state: the state of an optimizer with at least one Sophia, also nested, for example under
        `optax.partition`. Arrays may be sharded: one shard is copied at a time, and each process
        draws its own shards.
      group: the group of a parameter by its path; None leaves the parameter out. By default the
        path itself, with one group for all members of a list.
      b2: the optimizer's b2, to correct h for its start at zero, as the update does. None draws the
        stored h.

    Returns:
      The figure.

    Raises:
      ValueError: if there is no state of Sophia, or h is nowhere positive.
    """
    spreads: dict[str, _Spread] = {}
    for path, leaf, refreshes in _curvature_leaves(opt_state):
        name = group(path)
        if name is not None:
            share = 1.0 if b2 is None or refreshes == 0 else 1 - b2**refreshes
            spreads[name] = spreads.get(name, _Spread.empty()) + _spread(leaf, share)
    drawn = {name: spread.counts.reshape(-1, 4).sum(axis=1) for name, spread in spreads.items()}
    shown = np.flatnonzero(sum(drawn.values()))
    if not shown.size:
        raise ValueError(
            "h is nowhere above zero, so a log scale has nothing to show. Take a step with an "
            "accepted estimate first."
        )
    first, last = shown[0], shown[-1] + 1
    edges = _EDGES[::4][first : last + 1]
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(spreads)), layout="constrained")
    axes = figure.subplots()
    for row, (name, spread) in enumerate(spreads.items()):
        counts = drawn[name][first:last]
        heights = 0.85 * counts / max(counts.max(), 1)
        axes.stairs(row - heights, edges, baseline=row, fill=True)
        missing = 1 - spread.counts.sum() / max(spread.size, 1)
        note = f"{spread.size:,}" + (f", {100 * missing:.3g} % not positive" if missing else "")
        axes.text(1.01, row - 0.1, note, transform=axes.get_yaxis_transform(), size="small")
    axes.set(xscale="log", xlabel="h", title="curvature by group, and coordinates in it")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_yticks(range(len(spreads)), list(spreads), verticalalignment="bottom")
    axes.set_ylim(len(spreads) - 0.9, -1)
    axes.grid(alpha=0.25)
    return figure


class _Spread(NamedTuple):
    """The number of coordinates, and of positive ones in each bin."""

    counts: np.ndarray
    size: int

    @classmethod
    def empty(cls) -> "_Spread":
        return cls(np.zeros(_BINS, np.int64), 0)

    def __add__(self, other: Any) -> "_Spread":
        return _Spread(self.counts + other.counts, self.size + other.size)


def _spread(leaf: Any, share: float = 1.0) -> _Spread:
    """Counts the coordinates of an array divided by `share`."""
    counts, size = _Spread.empty()
    for part in _parts(leaf):
        values = np.asarray(part).astype(np.float32).ravel()
        positive = values[values > 0] / np.float32(share)
        places = (np.log10(positive) - _LOWEST_DECADE) * _BINS_PER_DECADE
        counts += np.bincount(np.clip(places, 0, _BINS - 1).astype(int), minlength=_BINS)
        size += values.size
    return _Spread(counts, size)


def _parts(leaf: Any) -> list[Any]:
    """The distinct shards of an array on this process."""
    if not isinstance(leaf, jax.Array):
        return [leaf]
    return list({str(shard.index): shard.data for shard in leaf.addressable_shards}.values())


def _curvature_leaves(opt_state: PyTree[Any]) -> Iterator[tuple[tuple[Any, ...], Any, int]]:
    """Yields path, h and number of estimates for each parameter in every state of Sophia."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, ScaleBySophiaState))
    states = [node for node in nodes if isinstance(node, ScaleBySophiaState)]
    if not states:
        raise ValueError(
            "The optimizer state holds no ScaleBySophiaState. Pass the state of an optimizer made "
            "with sophia_h, sophia_g or scale_by_sophia."
        )
    for state in states:
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.nu):
            yield path, leaf, int(state.refreshes)


def _axes(label: str, title: str) -> tuple[Figure, Axes]:
    """An empty figure of a number by step."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="step", ylabel=label, title=title)
    axes.grid(alpha=0.25)
    return figure, axes


def _curves(runs: Runs, key: str) -> list[tuple[str, str, list[float], list[float]]]:
    """Color, name, steps and values of each run that has the number.

    Args:
      runs: records by run. Where a step is there twice, as in a run that was resumed at an older
        checkpoint, the later record holds.
      key: the name of the number.

    Returns:
      The curves.

    Raises:
      ValueError: if there is none.
    """
    curves = []
    for index, (name, records) in enumerate(runs.items()):
        points = {record["step"]: record[key] for record in records if key in record}
        if points:
            steps = sorted(points)
            curves.append((f"C{index}", name, steps, [points[step] for step in steps]))
    if not curves:
        raise ValueError(f"No record has a number under {key!r}. Log it beside 'step'.")
    return curves


def _percent(key: str) -> float:
    return float(key.removeprefix("curvature_q"))
