"""What the eigenbasis does: a valley across the axes, and the Hessian of a layer in both bases.

    python -m benchmarks.eigenbasis [--quick]

Writes `benchmarks/results/eigenbasis.json` and `.png`. The valley is a quadratic in the two numbers
of a 1 x 2 matrix. The layer is the second one of a network with 64, 16 and 10 units on
scikit-learn's digits, whose Hessian is small enough to be formed.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from sklearn.datasets import load_digits

import sophia_optax
from benchmarks.lib.provenance import RESULTS, provenance

# --- a valley across the axes ---------------------------------------------------------------------

ANGLE, CURVATURES = 0.6, (1.0, 100.0)
ROTATION = np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]])
VALLEY = jnp.array(ROTATION @ np.diag(CURVATURES) @ ROTATION.T, jnp.float32)
START = jnp.array([[-2.0, 1.5]])


def valley(w: jax.Array) -> jax.Array:
    """A quadratic whose long axis lies across both coordinates."""
    return 0.5 * jnp.sum((w @ VALLEY) * w)


def descend(eigenbasis: Any, steps: int) -> dict[str, Any]:
    """Sophia-H's way down from `START`."""
    tx = sophia_optax.sophia_h(0.1, b1=0.0, gamma=1.0, update_interval=1, eigenbasis=eigenbasis)

    @jax.jit
    def step(w: jax.Array, state: Any) -> Any:
        hessian_fn = sophia_optax.hutchinson(valley, w)
        updates, state = tx.update(jax.grad(valley)(w), state, w, hessian_fn=hessian_fn)
        return optax.apply_updates(w, updates), state

    w, state, path = START, tx.init(START), [START]
    for _ in range(steps):
        w, state = step(w, state)
        path.append(w)
    return {
        "path": np.stack(path)[:, 0].tolist(),
        "losses": [float(valley(w)) for w in path],
    }


# --- the Hessian of a layer -----------------------------------------------------------------------


def diagonal_share(hessian: np.ndarray) -> float:
    """The part of the sum of squares that is on the diagonal."""
    return float(np.sum(np.diag(hessian) ** 2) / np.sum(hessian**2))


def layer_hessians(steps: int) -> dict[str, np.ndarray]:
    """The Hessian of a trained layer in its own axes and in its eigenbasis."""
    digits = load_digits()
    x, labels = jnp.array(digits.data / 16.0, jnp.float32), jnp.array(digits.target)
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "hidden": 0.2 * jax.random.normal(keys[0], (64, 16)),
        "out": 0.2 * jax.random.normal(keys[1], (16, 10)),
    }

    def loss(params: Any, rows: Any) -> jax.Array:
        logits = jnp.tanh(x[rows] @ params["hidden"]) @ params["out"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    tx = sophia_optax.sophia_g(1e-2, b1=0.9, gamma=0.2, eigenbasis={"basis_interval": 1})
    seen: list[sophia_optax.Coordinates] = []

    def estimate(params: Any, rows: Any) -> Any:
        return sophia_optax.hutchinson(lambda p: loss(p, rows), params)

    @jax.jit
    def step(params: Any, state: Any, rows: Any) -> Any:
        grads = jax.grad(loss)(params, rows)
        updates, state = tx.update(grads, state, params, hessian_fn=estimate(params, rows))
        return optax.apply_updates(params, updates), state

    state, rng = tx.init(params), np.random.default_rng(0)
    for _ in range(steps):
        params, state = step(params, state, rng.integers(0, len(x), 128))

    def look(key: jax.Array, /, *, coordinates: sophia_optax.Coordinates) -> Any:
        seen.append(coordinates)
        return jax.tree.map(jnp.zeros_like, params)

    everything = np.arange(len(x))
    grads = jax.grad(loss)(params, everything)
    tx.update(grads, state, params, hessian_fn=look, refresh=True)
    (coordinates,) = seen

    def in_basis(vector: jax.Array) -> jax.Array:
        turned = {
            "hidden": jnp.zeros_like(params["hidden"]),
            "out": vector.reshape(params["out"].shape),
        }
        moved = params["out"] + coordinates.back(turned)["out"]
        return loss({**params, "out": moved}, everything)

    def in_own_axes(vector: jax.Array) -> jax.Array:
        moved = params["out"] + vector.reshape(params["out"].shape)
        return loss({**params, "out": moved}, everything)

    zeros = jnp.zeros(params["out"].size)
    return {
        "own axes": np.asarray(jax.jit(jax.hessian(in_own_axes))(zeros)),
        "eigenbasis": np.asarray(jax.jit(jax.hessian(in_basis))(zeros)),
    }


# --- the picture ----------------------------------------------------------------------------------


def plot(paths: dict[str, Any], hessians: dict[str, np.ndarray], path: Path) -> None:
    """Both ways down the valley, and both Hessians."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 5.2), layout="constrained")
    x, y = np.meshgrid(np.linspace(-2.6, 1.0, 200), np.linspace(-1.2, 2.2, 200))
    points = np.stack([x, y], axis=-1)
    losses = 0.5 * np.einsum("...i,ij,...j", points, np.asarray(VALLEY), points)
    panels[0].contour(x, y, losses, levels=np.geomspace(0.1, 500, 12), colors="0.8", linewidths=0.8)
    for name, way in paths.items():
        steps = np.array(way["path"])
        label = f"{name}: loss {way['losses'][-1]:.1e}"
        panels[0].plot(*steps.T, marker="o", ms=3, lw=1, label=label)
    panels[0].plot(0, 0, "k*", ms=12)
    panels[0].set(title=f"Sophia-H, {len(steps) - 1} steps", aspect="equal")
    panels[0].legend(loc="lower left")
    for axes, (name, hessian) in zip(panels[1:], hessians.items(), strict=True):
        size = np.log10(np.abs(hessian) / np.abs(hessian).max() + 1e-5)
        axes.imshow(size, cmap="magma", vmin=-4, vmax=0, interpolation="nearest")
        axes.set(
            title=f"Hessian in {name}: {diagonal_share(hessian):.0%} on the diagonal",
            xticks=[],
            yticks=[],
        )
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(quick: bool = False) -> None:
    """Computes both bases and writes the numbers and the picture.

    Args:
      quick: small, and written to runs/.
    """
    folder = Path("runs") if quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        "coordinate-wise": descend(False, 5 if quick else 60),
        "in the eigenbasis": descend({"basis_interval": 1}, 5 if quick else 60),
    }
    hessians = layer_hessians(5 if quick else 300)
    result = {
        **provenance("benchmarks.eigenbasis"),
        "valley": {name: {"losses": way["losses"]} for name, way in paths.items()},
        "squares_on_the_diagonal": {n: diagonal_share(h) for n, h in hessians.items()},
    }
    (folder / "eigenbasis.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(paths, hessians, folder / "eigenbasis.png")
    print(json.dumps(result["squares_on_the_diagonal"]))


if __name__ == "__main__":
    tyro.cli(main)
