"""Uses the installed wheel as a stranger would: the core's dependencies alone, no source tree.

Run it from a folder that does not hold the project.
"""

import importlib.metadata
import importlib.resources
import importlib.util

import jax
import jax.numpy as jnp
import optax

import sophia_optax

package = importlib.resources.files("sophia_optax")
assert "site-packages" in str(package), f"not the installed wheel: {package}"
assert (package / "py.typed").is_file()
assert sophia_optax.__version__ == importlib.metadata.version("sophia_optax")
for absent in ("flax", "matplotlib", "chex", "beartype", "tests", "examples"):
    assert importlib.util.find_spec(absent) is None, f"{absent} is installed"

x = jnp.linspace(-1.0, 1.0, 64).reshape(16, 4)
labels = jnp.argmax(x @ jnp.array([[1.0, -2.0, 0.5]] * 4), axis=-1)
params = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}


def logits(params: dict[str, jax.Array]) -> jax.Array:
    return x @ params["w"] + params["b"]


def loss_fn(params: dict[str, jax.Array]) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits(params), labels).mean()


for tx, hessian_of in (
    (sophia_optax.sophia_h(1e-2), lambda p: sophia_optax.hutchinson(loss_fn, p)),
    (sophia_optax.sophia_g(1e-2), lambda p: sophia_optax.gauss_newton_bartlett(logits, p)),
):

    @jax.jit
    def step(params, state, tx=tx, hessian_of=hessian_of):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, hessian_fn=hessian_of(params))
        return optax.apply_updates(params, updates), state, loss

    p, state = params, tx.init(params)
    losses = []
    for _ in range(50):
        p, state, loss = step(p, state)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0], losses
    assert int(sophia_optax.diagnostics(state).refreshes) == 5
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

for module, needs in (("nnx", "flax"), ("linen", "flax"), ("plotting", "matplotlib")):
    try:
        __import__(f"sophia_optax.{module}")
    except ImportError as error:
        assert needs in str(error), error
    else:
        raise AssertionError(f"sophia_optax.{module} imported without {needs}")

print(f"sophia_optax {sophia_optax.__version__}, jax {jax.__version__}: the wheel works")
