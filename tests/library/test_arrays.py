"""Arrays: dtypes to compute in, draws that match a leaf, zeros of their own, means over keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_optax import _arrays


@pytest.mark.parametrize(
    "leaf, inexact",
    [
        (1.0, True),
        (1, False),
        (True, False),
        (np.float16(1), True),
        (np.zeros(2, jax.dtypes.float0), False),
        (jnp.ones(2, jnp.bfloat16), True),
        (jax.ShapeDtypeStruct((2,), jnp.float32), True),
        (jax.ShapeDtypeStruct((2,), jnp.uint8), False),
        (jax.random.key(0), False),
    ],
    ids=str,
)
def test_what_counts_as_floating_point(leaf, inexact):
    assert bool(_arrays.is_inexact(leaf)) is inexact


@pytest.mark.parametrize(
    "dtype, wide",
    [
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    ],
)
def test_computations_are_in_float32_at_least(dtype, wide):
    assert _arrays.at_least_float32(jnp.dtype(dtype)) == jnp.dtype(wide)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_random_signs_are_signs_in_the_leafs_dtype(dtype):
    signs = _arrays.random_signs(jax.random.key(0), jnp.zeros((64, 64), dtype))
    assert signs.dtype == dtype
    values = np.asarray(signs, np.float64)
    assert set(np.unique(values)) == {-1, 1}
    assert abs(values.mean()) < 5 / 64


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_random_normals_are_normal_in_the_leafs_dtype(dtype):
    draw = _arrays.random_normal(jax.random.key(0), jnp.zeros((256, 256), dtype))
    assert draw.dtype == dtype
    values = np.asarray(draw, np.float64)
    assert abs(values.mean()) < 5 / 256
    np.testing.assert_allclose(values.var(), 1, atol=0.03)
    np.testing.assert_allclose(np.mean(values**4), 3, atol=0.2)
    assert np.abs(values).max() > 3.5


@pytest.mark.parametrize("leaf", [np.nan, np.inf, -1.0])
def test_zeros_are_zero_whatever_the_leaf_holds(leaf):
    zeros = _arrays.zeros_like(jnp.full((3, 2), leaf, jnp.bfloat16), jnp.float32)
    assert zeros.dtype == jnp.float32
    np.testing.assert_array_equal(zeros, np.zeros((3, 2)))


def test_zeros_have_a_buffer_of_their_own():
    leaf = jnp.ones((3, 2))
    first, second = _arrays.zeros_like(leaf, jnp.float32), _arrays.zeros_like(leaf, jnp.float32)
    pointers = {x.unsafe_buffer_pointer() for x in (leaf, first, second)}
    assert len(pointers) == 3


@pytest.mark.parametrize("num, chunk", [(1, 1), (6, 1), (6, 2), (6, 6)])
def test_a_mean_over_keys_is_the_mean_of_draws_with_keys_of_their_own(num, chunk):
    seen = []

    def draw(key):
        value = jax.random.normal(key, (3,))
        jax.debug.callback(lambda x: seen.append(tuple(np.ravel(x).tolist())), value)
        return [value, 2 * value]

    mean, double = _arrays.mean_over_keys(draw, jax.random.key(0), num, chunk)
    jax.effects_barrier()
    assert len(set(seen)) == num
    np.testing.assert_allclose(mean, np.mean(sorted(set(seen)), axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(double, 2 * mean, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 3, 1000])
def test_one_minus_a_power_near_one_keeps_its_digits(n):
    """1 - 0.9999 in float32 is wrong in the fourth digit."""
    count = jnp.int32(n)
    np.testing.assert_allclose(_arrays.one_minus_power(0.9999, count), 1 - 0.9999**n, rtol=1e-6)
    array = jnp.float32(0.9999)
    exact = -np.expm1(n * np.log(np.float64(array)))
    np.testing.assert_allclose(_arrays.one_minus_power(array, count), exact, rtol=1e-5)
    np.testing.assert_array_equal(_arrays.one_minus_power(0.0, count), 1)


@pytest.mark.parametrize("x64", [False, True])
def test_one_minus_a_power_of_an_array_is_traced_under_strict_promotion(x64):
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        for x in (0.3, 0.9):
            found = _arrays.one_minus_power(jnp.float32(x), jnp.int32(3))
            assert found.dtype == jnp.float32
            np.testing.assert_allclose(found, 1 - x**3, rtol=1e-5)
    assert np.isfinite(jax.grad(_arrays.one_minus_power)(jnp.float32(0.0), jnp.int32(1)))


def test_a_count_stays_at_the_largest_integer():
    largest = jnp.int32(2**31 - 1)
    assert _arrays.increment(largest) == largest
    assert _arrays.increment(largest - 1) == largest
