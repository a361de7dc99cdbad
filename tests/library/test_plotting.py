"""The pictures show what was logged and what the state holds, wherever the state lies."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sophia_optax

pytest.importorskip("matplotlib", reason="plotting needs matplotlib")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from sophia_optax import plotting

RUNS = {
    "g": [{"step": 10, "win_rate": 0.3, "gamma": 0.2}, {"step": 0, "win_rate": 0.1, "gamma": 0.1}],
    "h": [{"step": 0, "win_rate": 0.2, "gamma": 0.01}, {"step": 5, "val_loss": 1.5}],
    "adamw": [{"step": 0, "loss": 3.0}],
}
PARAMS = {
    "layers": [{"bias": jnp.ones(4)}, {"bias": jnp.ones(4)}],
    "embed": jnp.ones((8, 16)),
    "count": jnp.ones(2, jnp.int32),
}


def curvature_of(params: Any) -> Any:
    """Powers of ten, some of them negative, another range for each leaf."""

    def leaf(path: Any, p: jax.Array) -> jax.Array:
        powers = 10.0 ** (-(jnp.arange(p.size) % 7) - 2.0 * len(path))
        return (powers * jnp.where(jnp.arange(p.size) % 4 == 3, -1, 1)).reshape(p.shape)

    return jax.tree_util.tree_map_with_path(leaf, params)


def state_of(tx: Any, params: Any = PARAMS) -> Any:
    """The state after one estimate."""
    hessian = curvature_of(PARAMS)
    return tx.update(params, tx.init(params), params, hessian_fn=lambda key: hessian)[1]


def curves(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """What a picture has drawn as lines, by label."""
    return {line.get_label(): [*map(tuple, line.get_xydata())] for line in figure.axes[0].lines}


def rows(figure: Figure) -> dict[str, str]:
    """The groups of a histogram, from top to bottom, with what is written beside them."""
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    return dict(zip(names, [text.get_text() for text in figure.axes[0].texts], strict=True))


def shape_of(figure: Figure) -> list[Any]:
    return [(path.get_data().values.tolist()) for path in figure.axes[0].patches]


def test_metrics_are_read_by_run_and_without_one_too(tmp_path: Path) -> None:
    lines = [{"run": "a", "step": 0}, {"run": "b", "step": 0}, {"run": "a", "step": 1}, {"step": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = plotting.read_metrics(tmp_path / "metrics.jsonl")
    assert read == {"a": [{"step": 0}, {"step": 1}], "b": [{"step": 0}], "run": [{"step": 2}]}


@pytest.mark.parametrize("draw", [plotting.win_rate, plotting.gamma])
def test_a_curve_is_drawn_for_each_run_that_logged_it_in_the_order_of_the_steps(draw: Any) -> None:
    key = draw.__name__
    drawn = curves(draw(RUNS))
    assert drawn["g"] == [(0, RUNS["g"][1][key]), (10, RUNS["g"][0][key])]
    assert drawn["h"] == [(0, RUNS["h"][0][key])]
    assert "adamw" not in drawn


def test_of_a_step_taken_again_after_a_resume_the_later_record_holds() -> None:
    records = [{"step": 0, "gamma": 1.0}, {"step": 1, "gamma": 2.0}, {"step": 1, "gamma": 3.0}]
    assert curves(plotting.gamma({"run": records}))["run"] == [(0, 1.0), (1, 3.0)]


@pytest.mark.parametrize("draw", [plotting.win_rate, plotting.gamma, plotting.curvature])
def test_nothing_logged_is_an_error_with_the_name_to_log_under(draw: Any) -> None:
    name = {"curvature": "curvature_q50"}.get(draw.__name__, draw.__name__)
    with pytest.raises(ValueError, match=f"'{name}'"):
        draw({"adamw": RUNS["adamw"]})


def test_quantiles_are_those_of_numpy_to_a_bin() -> None:
    h = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(curvature_of(PARAMS))])
    state = state_of(sophia_optax.scale_by_sophia(b2=0.0), PARAMS)
    h[-h.size :][: PARAMS["count"].size] = 0.0  # "count" comes first, and integers have none
    found = plotting.curvature_quantiles(state, [0.1, 0.5, 0.75, 1.0])
    assert list(found) == [f"curvature_q{q}" for q in (10, 50, 75, 100)]
    for (_, value), q in zip(found.items(), [0.1, 0.5, 0.75, 1.0], strict=True):
        expected = np.quantile(h, q, method="inverted_cdf")
        np.testing.assert_allclose(value, max(expected, 0.0), rtol=0.08)


def test_a_state_that_is_on_the_host_has_the_same_quantiles() -> None:
    state = state_of(sophia_optax.sophia_h(1e-3))
    on_host = jax.device_get(state)
    assert plotting.curvature_quantiles(on_host) == plotting.curvature_quantiles(state)


def test_what_is_logged_as_quantiles_is_drawn_as_a_line_in_a_band() -> None:
    state = state_of(sophia_optax.scale_by_sophia())
    record = {"step": 3, **plotting.curvature_quantiles(state, [0.4, 0.5, 0.9])}
    figure = plotting.curvature({"run": [record, {"step": 4}]})
    assert curves(figure)["run"] == [(3, record["curvature_q50"])]
    (band,) = figure.axes[0].collections
    (box,) = [path.get_extents() for path in band.get_paths()]
    np.testing.assert_allclose(
        [box.y0, box.y1], [record["curvature_q40"], record["curvature_q90"]], rtol=1e-6
    )


def test_the_histogram_has_a_row_for_each_path_with_the_members_of_a_list_together() -> None:
    drawn = rows(plotting.curvature_histogram(state_of(sophia_optax.sophia_h(1e-3))))
    assert drawn == {
        "count": "2, 100 % not positive",
        "embed": "128, 25 % not positive",
        "layers.*.bias": "8, 25 % not positive",
    }


def test_a_box_around_a_parameter_is_no_part_of_its_name() -> None:
    layers, value = jax.tree_util.DictKey("layers"), jax.tree_util.GetAttrKey("value")
    assert plotting.by_path((layers, jax.tree_util.DictKey(0), value)) == "layers.*"
    assert plotting.by_path((value, layers)) == "value.layers"
    assert plotting.by_path(()) == "(root)"


def test_the_histogram_has_a_row_for_each_group_of_the_users() -> None:
    def group(path: tuple[Any, ...]) -> str | None:
        return {"layers": "biases", "embed": "matrices"}.get(path[0].key)

    state = state_of(sophia_optax.sophia_h(1e-3))
    assert list(rows(plotting.curvature_histogram(state, group))) == ["matrices", "biases"]


def test_a_bar_is_as_high_as_its_bin_is_full() -> None:
    tx = sophia_optax.scale_by_sophia(b2=0.0)
    params = jnp.ones(4)
    hessian = jnp.array([1.1, 1.2, 1.3, 4.0])
    _, state = tx.update(params, tx.init(params), params, hessian_fn=lambda key: hessian)
    ((three, empty, one),) = (
        [-value for value in values] for values in shape_of(plotting.curvature_histogram(state))
    )
    np.testing.assert_allclose([three, empty, one], [0.85, 0.0, 0.85 / 3], atol=1e-12)


def test_with_b2_the_histogram_is_that_of_the_corrected_curvature() -> None:
    exact = plotting.curvature_histogram(state_of(sophia_optax.scale_by_sophia(b2=0.0)))
    tx = sophia_optax.scale_by_sophia(b2=0.99)
    corrected = plotting.curvature_histogram(state_of(tx), b2=0.99)
    stored = plotting.curvature_histogram(state_of(tx))
    limits = [figure.axes[0].get_xlim() for figure in (exact, corrected, stored)]
    np.testing.assert_allclose(limits[1], limits[0])
    np.testing.assert_allclose(limits[2], np.array(limits[0]) / 100)


NESTINGS: dict[str, Any] = {
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 1),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda b1: tx)(b1=0.5),
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_the_state_is_found_in_any_nesting(nesting: str) -> None:
    tx = sophia_optax.scale_by_sophia()
    nested = plotting.curvature_histogram(state_of(NESTINGS[nesting](tx)))
    assert rows(nested) == rows(plotting.curvature_histogram(state_of(tx)))
    assert shape_of(nested) == shape_of(plotting.curvature_histogram(state_of(tx)))


def test_under_a_mask_only_what_is_owned_is_drawn() -> None:
    tx = optax.masked(
        sophia_optax.scale_by_sophia(), {"layers": True, "embed": False, "count": False}
    )
    assert list(rows(plotting.curvature_histogram(state_of(tx)))) == ["layers.*.bias"]


def test_of_a_partition_every_sophia_is_drawn() -> None:
    two = {"h": sophia_optax.sophia_h(1e-3), "g": sophia_optax.sophia_g(1e-3)}
    tx = optax.partition(two, {"layers": "g", "embed": "h", "count": "h"})
    assert set(rows(plotting.curvature_histogram(state_of(tx)))) == {
        "count",
        "embed",
        "layers.*.bias",
    }


@pytest.mark.parametrize("spec", [PartitionSpec("x"), PartitionSpec(None, "x"), PartitionSpec()])
def test_a_sharded_state_is_drawn_as_a_whole_one(spec: PartitionSpec) -> None:
    mesh = jax.make_mesh((8,), ("x",))
    params = PARAMS | {"embed": jax.device_put(PARAMS["embed"], NamedSharding(mesh, spec))}
    tx = sophia_optax.scale_by_sophia()
    hessian = curvature_of(PARAMS)
    state = tx.init(params)
    hessian["embed"] = jax.device_put(hessian["embed"], params["embed"].sharding)
    _, state = tx.update(params, state, params, hessian_fn=lambda key: hessian)
    assert len(state.nu["embed"].sharding.device_set) == 8
    whole = plotting.curvature_histogram(state_of(tx))
    assert rows(plotting.curvature_histogram(state)) == rows(whole)
    assert shape_of(plotting.curvature_histogram(state)) == shape_of(whole)


def test_bfloat16_curvature_is_drawn() -> None:
    tx = sophia_optax.scale_by_sophia(nu_dtype=jnp.bfloat16)
    assert "embed" in rows(plotting.curvature_histogram(state_of(tx)))


def test_states_with_nothing_to_draw_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="no ScaleBySophiaState"):
        plotting.curvature_histogram(optax.adam(1e-3).init(PARAMS))
    with pytest.raises(ValueError, match="no ScaleBySophiaState"):
        plotting.curvature_quantiles(optax.adam(1e-3).init(PARAMS))
    with pytest.raises(ValueError, match="accepted estimate"):
        plotting.curvature_histogram(sophia_optax.sophia_h(1e-3).init(PARAMS))


def test_pictures_can_be_saved_and_open_no_window(tmp_path: Path) -> None:
    state = state_of(sophia_optax.sophia_h(1e-3))
    quantiles = [{"step": 0, **plotting.curvature_quantiles(state)}]
    figures = [
        plotting.win_rate(RUNS),
        plotting.gamma(RUNS),
        plotting.curvature({"h": quantiles}),
        plotting.curvature_histogram(state),
    ]
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png", dpi=50)
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")
    assert plt.get_fignums() == []
