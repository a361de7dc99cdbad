"""Trees: which leaves are owned, and which can be differentiated."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sophia_optax import _trees


class Pair(NamedTuple):
    first: Any
    second: Any


HOLE = optax.MaskedNode()


# --- owned leaves ---------------------------------------------------------------------------------

FULL = {
    "a": jnp.arange(3.0),
    "b": {"c": jnp.ones((2, 2)), "d": jnp.float32(4.0)},
    "e": Pair(jnp.zeros((0,)), jnp.array([7.0])),
    "n": jnp.arange(2),
}


def taken(gradients: Any, estimate: Any = FULL) -> list[Any]:
    return _trees.OwnedLeaves.of(gradients).select_estimate(estimate)


def test_every_floating_point_leaf_is_owned_where_nothing_is_masked():
    leaves = taken(FULL)
    assert [leaf.shape for leaf in leaves] == [(3,), (2, 2), (), (0,), (1,)]
    np.testing.assert_array_equal(leaves[0], FULL["a"])
    assert _trees.OwnedLeaves.of(FULL).size == 3 + 4 + 1 + 0 + 1


@pytest.mark.parametrize("hole", [HOLE, None], ids=["MaskedNode", "None"])
def test_a_hole_stands_for_a_leaf(hole):
    gradients = {**FULL, "a": hole, "e": Pair(FULL["e"].first, hole)}
    leaves = taken(gradients)
    assert [leaf.shape for leaf in leaves] == [(2, 2), (), (0,)]
    assert _trees.OwnedLeaves.of(gradients).size == 5


@pytest.mark.parametrize("hole", [HOLE, None], ids=["MaskedNode", "None"])
def test_a_hole_stands_for_a_whole_subtree(hole):
    leaves = taken({**FULL, "b": hole, "e": hole})
    assert [leaf.shape for leaf in leaves] == [(3,)]


@pytest.mark.parametrize("hole", [HOLE, None], ids=["MaskedNode", "None"])
def test_nothing_at_all_may_be_owned(hole):
    assert taken(hole) == []
    assert taken(jax.tree.map(lambda _: hole, FULL)) == []
    assert _trees.OwnedLeaves.of(hole).size == 0


def test_a_leaf_that_is_none_in_the_params_stays_none():
    assert [
        x.shape for x in taken({"a": jnp.ones(3), "b": None}, {"a": jnp.ones(3), "b": None})
    ] == [(3,)]


def test_the_estimate_of_what_is_not_owned_is_not_looked_at():
    estimate = {**FULL, "a": jnp.full((9,), jnp.nan), "n": None}
    assert len(taken({**FULL, "a": HOLE, "n": HOLE}, estimate)) == 4


def test_replace_sets_owned_leaves_and_keeps_the_rest_and_holes():
    gradients = {"a": HOLE, "b": jnp.ones(2, jnp.bfloat16), "n": jnp.arange(2), "z": None}
    state = {"a": HOLE, "b": jnp.zeros(2, jnp.bfloat16), "n": jnp.zeros(2), "z": None}
    new = _trees.OwnedLeaves.of(gradients).replace(state, [jnp.array([1.0, 2.0], jnp.bfloat16)])
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert new["b"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(new["b"], np.float32), [1, 2])
    np.testing.assert_array_equal(new["n"], [0, 0])


@pytest.mark.parametrize(
    "estimate, path",
    [
        ({k: v for k, v in FULL.items() if k != "a"}, "['a']"),
        ({**FULL, "b": {"c": FULL["b"]["c"]}}, "['b']['d']"),
        ({**FULL, "extra": jnp.ones(1)}, "['extra']"),
        ({**FULL, "e": Pair(FULL["e"].first, None)}, "['e'].second"),
        ({**FULL, "a": {"inner": FULL["a"]}}, "['a']"),
        (jnp.ones(9), "['a']"),
    ],
    ids=["missing", "missing below", "extra", "none", "deeper", "flat"],
)
def test_an_estimate_of_another_structure_is_refused_with_the_path(estimate, path):
    with pytest.raises(ValueError, match="hessian_fn") as caught:
        taken(FULL, estimate)
    assert path in str(caught.value)


def test_an_estimate_of_another_shape_is_refused_with_path_and_shapes():
    with pytest.raises(ValueError, match="hessian_fn") as caught:
        taken(FULL, {**FULL, "b": {"c": jnp.ones((4,)), "d": FULL["b"]["d"]}})
    for word in ("['b']['c']", "(4,)", "(2, 2)"):
        assert word in str(caught.value)


@pytest.mark.parametrize("dtype", ["complex64", "bool"])
def test_an_estimate_that_is_not_real_is_refused_with_path_and_dtype(dtype):
    with pytest.raises(TypeError, match="hessian_fn") as caught:
        taken(FULL, {**FULL, "a": jnp.ones(3, dtype)})
    assert "['a']" in str(caught.value)
    assert dtype in str(caught.value)


def test_the_root_has_a_name():
    assert _trees.name_of(()) == "(root)"
    with pytest.raises(ValueError, match="hessian_fn") as caught:
        taken(jnp.ones(3), jnp.ones(4))
    assert "(root)" in str(caught.value)


def test_masks_are_seen_wherever_they_are():
    assert not _trees.is_masked(FULL)
    assert not _trees.is_masked({"a": None})
    assert _trees.is_masked(HOLE)
    assert _trees.is_masked({**FULL, "b": {"c": HOLE, "d": FULL["b"]["d"]}})


# --- leaves to differentiate ----------------------------------------------------------------------


def test_only_floating_point_leaves_are_differentiated():
    tree = {"f": jnp.ones(2), "i": jnp.arange(3), "none": None, "py": 2.5, "b": jnp.array(True)}
    theta = _trees.differentiable(tree)
    assert sorted(leaf.shape for leaf in theta.leaves) == [(), (2,)]
    back = theta.combine([2 * leaf for leaf in theta.leaves])
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    np.testing.assert_array_equal(back["f"], [2, 2])
    np.testing.assert_array_equal(back["i"], tree["i"])
    assert back["py"] == 5
    filled = theta.combine_with_zeros([jnp.full(leaf.shape, 7.0) for leaf in theta.leaves])
    np.testing.assert_array_equal(filled["f"], [7, 7])
    np.testing.assert_array_equal(filled["i"], np.zeros(3))
    assert filled["i"].dtype == jnp.float32
    assert filled["b"].shape == ()


def test_a_complex_leaf_is_refused_with_its_path():
    with pytest.raises(TypeError, match="complex64") as caught:
        _trees.differentiable({"a": [jnp.ones(2), jnp.ones(2, jnp.complex64)]})
    assert "['a'][1]" in str(caught.value)


def test_updates_take_the_dtypes_of_the_gradients():
    grads = {
        "bf16": jnp.ones(2, jnp.bfloat16),
        "int": jnp.ones(2, jnp.int16),
        "float0": np.zeros((3,), jax.dtypes.float0),
        "none": None,
        "hole": HOLE,
    }
    updates = {
        "bf16": jnp.full(2, 0.5),
        "int": jnp.full(2, 9.0),
        "float0": jnp.full(3, 9.0),
        "none": None,
        "hole": HOLE,
    }
    given = _trees.cast_updates(updates, grads, None)
    assert jax.tree.structure(given) == jax.tree.structure(grads)
    assert given["bf16"].dtype == jnp.bfloat16
    assert given["int"].dtype == jnp.int16
    assert given["float0"].shape == (3,)
    assert not np.any(given["int"])
    assert not np.any(given["float0"])
    np.testing.assert_array_equal(np.asarray(given["bf16"], np.float32), [0.5, 0.5])
