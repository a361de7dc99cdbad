"""Hypothesis strategies: trees of every shape that a set of parameters comes in.

Shapes and sizes are few and small, so that what is compiled for one example serves the next.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

SHAPES = ((), (3,), (2, 3), (0, 2))
DTYPES = ("float32", "bfloat16")


def _nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda children: st.one_of(
            st.dictionaries(st.sampled_from("abcd"), children, min_size=1, max_size=3),
            st.lists(children, min_size=1, max_size=3),
            st.tuples(children, children),
        ),
        max_leaves=4,
    )


def structs(
    dtypes: Sequence[str] = DTYPES, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> st.SearchStrategy[Any]:
    """Trees of `jax.ShapeDtypeStruct`."""
    leaf = st.builds(jax.ShapeDtypeStruct, st.sampled_from(shapes), st.sampled_from(dtypes))
    return _nested(leaf)


def fill(tree: Any, rng: np.random.Generator, scale: float = 1.0, dtype: Any = None) -> Any:
    """Normal numbers in a tree of structs, their sizes spread over six orders of magnitude."""

    def leaf(struct: jax.ShapeDtypeStruct) -> jax.Array:
        spread = 10.0 ** rng.uniform(-3, 3, size=struct.shape)
        return jnp.asarray(scale * spread * rng.normal(size=struct.shape), dtype or struct.dtype)

    return jax.tree.map(leaf, tree)


@dataclasses.dataclass(frozen=True)
class Steps:
    """A few steps' gradients and estimates for one tree, and the tree's structs.

    Attributes:
        structs: Shapes and dtypes.
        grads: A tree of gradients for each step.
        estimates: A tree of estimates, float32, for each step.
    """

    structs: Any
    grads: list[Any]
    estimates: list[Any]

    def __repr__(self) -> str:
        return f"Steps({jax.tree.map(lambda s: (s.shape, s.dtype.name), self.structs)})"


@st.composite
def steps(
    draw: st.DrawFn,
    number: int = 3,
    dtypes: Sequence[str] = DTYPES,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
) -> Steps:
    """A tree with random gradients and estimates of both signs."""
    tree = draw(structs(dtypes, shapes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return Steps(
        structs=tree,
        grads=[fill(tree, rng) for _ in range(number)],
        estimates=[fill(tree, rng, 30.0, "float32") for _ in range(number)],
    )


@st.composite
def hyperparameters(draw: st.DrawFn) -> dict[str, Any]:
    """Keywords of `scale_by_sophia`, from the ends of their ranges inwards."""
    return {
        "b1": draw(st.sampled_from((0.0, 0.5, 0.965))),
        "b2": draw(st.sampled_from((0.0, 0.9, 0.99))),
        "gamma": draw(st.sampled_from((0.01, 0.05, 1.0))),
        "clip_threshold": draw(st.sampled_from((0.25, 1.0, 3.0))),
        "update_interval": draw(st.integers(1, 3)),
        "bias_correction": draw(st.booleans()),
        "absolute_curvature": draw(st.booleans()),
    }
