"""The sub-batch for the curvature: evenly spread, every leaf alike, sizes that fit."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sophia_optax


def batch_of(length: int) -> Any:
    rows = np.arange(length)
    return {
        "tokens": jnp.asarray(rows[:, None] * 100 + np.arange(3)),
        "mask": np.asarray(rows % 2 == 0),
        "nested": (jnp.asarray(rows, jnp.bfloat16), None, []),
        "empty": jnp.zeros((length, 0, 2)),
    }


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_it_takes_examples_at_equal_distances(size):
    batch = batch_of(12)
    part = sophia_optax.curvature_batch(batch, size)
    assert jax.tree.structure(part) == jax.tree.structure(batch)
    for taken, whole in zip(jax.tree.leaves(part), jax.tree.leaves(batch), strict=True):
        assert taken.shape == (size, *whole.shape[1:])
        assert taken.dtype == whole.dtype
        np.testing.assert_array_equal(np.asarray(taken), np.asarray(whole)[:: 12 // size])


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_every_shard_gives_its_share(shards):
    # Contiguous shards of the examples, as a mesh has them: each gives size / shards.
    part = sophia_optax.curvature_batch(jnp.arange(16), 4)
    np.testing.assert_array_equal(np.bincount(np.asarray(part) * shards // 16), 4 // shards)


def test_it_runs_under_jit_and_on_bare_arrays_and_empty_batches():
    take = jax.jit(sophia_optax.curvature_batch, static_argnums=1)
    np.testing.assert_array_equal(take(jnp.arange(8), 2), [0, 4])
    np.testing.assert_array_equal(sophia_optax.curvature_batch(np.arange(8), 4), [0, 2, 4, 6])
    assert sophia_optax.curvature_batch({}, 3) == {}


def test_typed_keys_are_examples_too():
    keys = jax.random.split(jax.random.key(0), 6)
    part = sophia_optax.curvature_batch({"dropout": keys}, 3)["dropout"]
    np.testing.assert_array_equal(jax.random.key_data(part), jax.random.key_data(keys)[::2])


@pytest.mark.parametrize("length, size", [(12, 5), (12, 8), (7, 3), (256, 100), (11, 10)])
def test_a_size_that_does_not_divide_takes_distinct_examples_evenly(length, size):
    rows = np.asarray(sophia_optax.curvature_batch(jnp.arange(length), size))
    assert rows.shape == (size,)
    distances = np.diff(rows, append=length)
    assert rows[0] == 0
    assert set(distances) <= {length // size, -(-length // size)}


@pytest.mark.parametrize("size", [12, 13, 24])
def test_a_batch_with_fewer_examples_is_taken_whole(size):
    """As the last one of an epoch has, where the loader does not drop it."""
    part = sophia_optax.curvature_batch(batch_of(12), size)
    chex.assert_trees_all_equal(part, batch_of(12))


@pytest.mark.parametrize(
    "size, error",
    [(0, ValueError), (-3, ValueError), (1.5, ValueError), ("2", TypeError), (None, TypeError)],
)
def test_a_size_that_is_no_count_is_refused(size, error):
    unchecked = getattr(
        sophia_optax.curvature_batch, "__wrapped__", sophia_optax.curvature_batch
    )  # our own words, not the type checker's
    with pytest.raises(error, match=r"\bsize\b") as caught:
        unchecked(batch_of(12), size)
    assert repr(size) in str(caught.value)


@pytest.mark.parametrize(
    "odd, shape", [(np.zeros((4, 3)), "(4, 3)"), (np.zeros((24,)), "(24,)"), (np.zeros(()), "()")]
)
@pytest.mark.parametrize("position", ["a", "m", "z"])
def test_every_leaf_is_checked(odd, shape, position):
    batch = {"b": np.zeros((12, 3)), "n": {"c": np.zeros((12,))}, "y": np.zeros((12, 1))}
    with pytest.raises(ValueError, match="axis") as caught:
        sophia_optax.curvature_batch({**batch, position: {"odd": odd}}, 4)
    message = str(caught.value)
    assert f"['{position}']['odd']" in message
    assert shape in message or "12" in message


def test_a_scalar_in_the_batch_is_refused_by_name():
    with pytest.raises(ValueError, match="axis") as caught:
        sophia_optax.curvature_batch({"x": np.zeros((4, 2)), "step": 3}, 2)
    assert "['step']" in str(caught.value)


def test_rows_are_spread_evenly_where_their_products_do_not_fit_32_bits() -> None:
    size, length = 40_000, 100_001
    chosen = sophia_optax.curvature_batch(jnp.arange(length), size)
    np.testing.assert_array_equal(chosen, np.arange(size, dtype=np.int64) * length // size)
