# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Curvature, exact and estimated
#
# [![Open Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
# In Colab, choose File > Upload notebook. The first cell installs what is missing.
#
# Sophia divides by the diagonal of the Hessian, which is too expensive to compute for a large
# model. Two estimators approximate it. This notebook compares them with the exact diagonal of a
# small network. Then it trains a small transformer, whose curvature spans many orders of magnitude.

# %%
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

# A git URL ("git+https://...") or the path of a wheel. If empty: a wheel that was uploaded, or the
# clone that this notebook is in, or the package index.
SOURCE = ""
if importlib.util.find_spec("sophia_optax") is None:
    found = [str(path) for path in Path().glob("sophia_optax-*.whl")]
    found += [".."] * Path("../sophia_optax").is_dir() + ["sophia_optax"]
    packages = [SOURCE or found[0], "matplotlib>=3.9"]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *packages], check=True)
    for name in {"jax", "numpy"} & set(sys.modules):
        if sys.modules[name].__version__ != importlib.metadata.version(name):
            raise SystemExit(f"Installed. {name} was loaded before: restart, and run from the top.")

import sysconfig

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import sophia_optax
import sophia_optax.plotting

cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels

# %% [markdown]
# ## Compute the exact diagonal of a small network
#
# A classifier with 8 inputs, 12 hidden units and 3 classes, trained for a while. Its 147 parameters
# have a Hessian of 147 x 147, which `jax.hessian` can form.

# %%
rng = np.random.default_rng(0)
EXAMPLES = 512
inputs = rng.normal(size=(EXAMPLES, 8)).astype(np.float32) * np.geomspace(3, 0.1, 8)
labels = np.argmax(np.sin(inputs @ rng.normal(size=(8, 3))) + rng.normal(size=(1, 3)), axis=1)
inputs, labels = jnp.asarray(inputs, jnp.float32), jnp.asarray(labels)

params, unflatten = ravel_pytree(
    {
        "w1": 0.4 * rng.normal(size=(8, 12)).astype(np.float32),
        "b1": np.zeros(12, np.float32),
        "w2": 0.4 * rng.normal(size=(12, 3)).astype(np.float32),
        "b2": np.zeros(3, np.float32),
    }
)


def logits_fn(params, inputs):
    p = unflatten(params)
    return jnp.tanh(inputs @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]


def loss_fn(params, inputs, labels):
    return cross_entropy(logits_fn(params, inputs), labels).mean()


@jax.jit
def descend(params):
    def step(params, _):
        loss, grads = jax.value_and_grad(loss_fn)(params, inputs, labels)
        return params - 0.3 * grads, loss

    return jax.lax.scan(step, params, length=300)


params, losses = descend(params)
print(f"{params.size} parameters, loss {losses[0]:.2f} -> {losses[-1]:.2f}")

# %% [markdown]
# There are two diagonals to estimate. With $f$ the logits, $J$ their Jacobian and $H_f$ the second
# derivative of the cross-entropy in them, the Hessian is
#
# $$\nabla^2 L = \underbrace{\operatorname{mean}_i J_i^\top H_{f,i}\, J_i}_{\text{Gauss-Newton}}
# + \underbrace{\operatorname{mean}_i \textstyle\sum_c
# \frac{\partial \ell_i}{\partial f_{ic}} \nabla^2 f_{ic}}_{\text{curvature of the network}}$$
#
# The first term is never negative on its diagonal. The second can have any sign; it is small where
# the residuals $\partial \ell / \partial f$ are.


# %%
@jax.jit
def exact_hessian(params):
    return jnp.diag(jax.hessian(loss_fn)(params, inputs, labels))


@jax.jit
def exact_gauss_newton(params):
    jacobian = jax.jacobian(logits_fn)(params, inputs)  # examples, classes, parameters
    p = jax.nn.softmax(logits_fn(params, inputs))
    middle = jnp.einsum("bc,cd->bcd", p, jnp.eye(3)) - jnp.einsum("bc,bd->bcd", p, p)
    return jnp.einsum("bcp,bcd,bdp->p", jacobian, middle, jacobian) / EXAMPLES


hessian, gauss_newton = exact_hessian(params), exact_gauss_newton(params)
print(f"Hessian:      {hessian.min():8.4f} to {hessian.max():.3f}, {(hessian < 0).mean():.0%} < 0")
print(f"Gauss-Newton: {gauss_newton.min():8.4f} to {gauss_newton.max():.3f}")

# %% [markdown]
# ## Compare two estimators with it
#
# **Hutchinson** (Sophia-H) estimates the Hessian's diagonal by $u \odot (\nabla^2 L\, u)$ with
# random signs $u$. It needs a loss that can be differentiated twice.
#
# **Gauss-Newton-Bartlett** (Sophia-G) estimates the Gauss-Newton diagonal. It draws labels from the
# model's own prediction, computes the gradient on them and squares it. It needs first derivatives
# only, and is never negative. The library computes it from the logits, and scales it so that no
# batch size has to be passed.
#
# Each returns a function from a random key to an estimate:

# %%
estimators = {
    "Hutchinson": lambda n: sophia_optax.hutchinson(
        lambda p: loss_fn(p, inputs, labels), params, num_probes=n
    ),
    "Gauss-Newton-Bartlett": lambda n: sophia_optax.gauss_newton_bartlett(
        lambda p: logits_fn(p, inputs), params, num_samples=n
    ),
    "GNB, curvature propagation": lambda n: sophia_optax.gauss_newton_bartlett(
        lambda p: logits_fn(p, inputs), params, num_samples=n, sampling="curvature_propagation"
    ),
}
targets = dict(zip(estimators, (hessian, gauss_newton, gauss_newton), strict=True))

figure, rows = plt.subplots(2, 2, figsize=(9, 8), layout="constrained", sharex="col", sharey="col")
for row, probes in zip(rows, (1, 100), strict=True):
    for axes, name in zip(row, list(estimators)[:2], strict=True):
        exact, estimate = targets[name], jax.jit(estimators[name](probes))(jax.random.key(0))
        axes.plot(*[jnp.sort(exact)] * 2, color="0.6", linewidth=1)
        axes.plot(exact, estimate, ".", alpha=0.6)
        axes.set_xscale("symlog", linthresh=1e-3)
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set(title=f"{name}, {probes} probe{'s' * (probes > 1)}", ylabel="estimate")
for axes in rows[-1]:
    axes.set_xlabel("exact")
plt.show()

# %% [markdown]
# One probe estimates a single coordinate poorly. Training uses one probe per refresh and averages
# over refreshes, with decay `b2=0.99` at each, so about a hundred of them count. The lower row
# shows the mean of a hundred probes.
#
# ## Measure how the error falls
#
# The estimators are unbiased, so averaging $n$ draws divides the variance by $n$. The relative
# error $\lVert \hat h - h \rVert / \lVert h \rVert$ falls as $1 / \sqrt n$, the gray line. The cell
# below draws 1024 estimates of one probe each, and averages them in groups of $n$. On the right the
# estimates use a part of the batch, and the exact diagonal uses all of it.


# %%
def many(hessian_fn):
    """1024 estimates of one probe each."""
    return jax.jit(jax.vmap(hessian_fn))(jax.random.split(jax.random.key(1), 1024))


def relative_error(estimates, probes, exact):
    means = estimates.reshape(-1, probes, exact.size).mean(axis=1)
    return np.sqrt(np.mean(np.sum((means - exact) ** 2, axis=1)) / np.sum(exact**2))


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
probes = [1, 4, 16, 64]
for name, make in estimators.items():
    estimates = many(make(1))
    errors = [relative_error(estimates, n, targets[name]) for n in probes]
    left.plot(probes, errors, "o-", label=name)
left.plot(probes, 1 / np.sqrt(probes), color="0.6", label=r"$1 / \sqrt{n}$")
left.set(xscale="log", yscale="log", xlabel="probes", ylabel="relative error")
left.set_title("whole batch")
left.legend(fontsize="small")

sizes = [8, 32, 128, 512]
parts = [sophia_optax.curvature_batch((inputs, labels), size) for size in sizes]
for number, name in enumerate(list(estimators)[:2]):
    draws = []
    for x, y in parts:
        if name == "Hutchinson":
            fn = sophia_optax.hutchinson(lambda p, x=x, y=y: loss_fn(p, x, y), params)
        else:
            fn = sophia_optax.gauss_newton_bartlett(lambda p, x=x: logits_fn(p, x), params)
        draws.append(many(fn))
    for n, style in {1: "o-", 64: "o--"}.items():
        errors = [relative_error(d, n, targets[name]) for d in draws]
        right.plot(sizes, errors, style, color=f"C{number}", label=f"{name}, {n}")
right.set(xscale="log", xlabel="examples that the estimate sees", title="1 and 64 probes")
right.legend(fontsize="small")
plt.show()

# %% [markdown]
# The right plot shows why a part of the batch is enough. With one probe (solid lines), the error
# hardly depends on the number of examples: it is the noise of the probe, and more data do not
# remove it. The number of examples matters only for many probes (dashed).
#
# So here a refresh on a part of the batch is nearly as good and costs that part. On a language
# model this holds for Gauss-Newton-Bartlett; Hutchinson's error grows there. The paper uses 32 of
# 480 sequences for Sophia-H and 240 for Sophia-G. `sophia_optax.curvature_batch(batch, size)`
# selects a part without moving data between devices.
#
# ## Look at a transformer
#
# Two layers, width 48, on bytes of Python's standard library. The params are a plain dictionary.

# %%
LAYERS, WIDTH, HEADS, CONTEXT, VOCABULARY = 2, 48, 4, 48, 128

folder = Path(sysconfig.get_path("stdlib"))
text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:100])
tokens = np.minimum(np.frombuffer(text, np.uint8), VOCABULARY - 1).astype(np.int32)


def batches(count, size=16):
    rng = np.random.default_rng(0)
    for starts in rng.integers(0, len(tokens) - CONTEXT - 1, (count, size)):
        yield jnp.asarray(tokens[starts[:, None] + np.arange(CONTEXT + 1)])


def init_params(key):
    keys = iter(jax.random.split(key, 2 + 4 * LAYERS))
    small = 0.1 / (2 * LAYERS) ** 0.5

    def matrix(*shape, scale=0.1):
        return scale * jax.random.normal(next(keys), shape)

    def layer():
        return {
            "norm_1": jnp.ones(WIDTH),
            "qkv": matrix(WIDTH, 3, HEADS, WIDTH // HEADS),
            "out": matrix(HEADS, WIDTH // HEADS, WIDTH, scale=small),
            "norm_2": jnp.ones(WIDTH),
            "up": matrix(WIDTH, 4 * WIDTH),
            "down": matrix(4 * WIDTH, WIDTH, scale=small),
        }

    return {
        "embedding": matrix(VOCABULARY, WIDTH),
        "positions": matrix(CONTEXT, WIDTH),
        "layers": [layer() for _ in range(LAYERS)],
        "norm": jnp.ones(WIDTH),
    }


def rms_norm(x, scale):
    return scale * x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def transformer(params, tokens):
    x = params["embedding"][tokens] + params["positions"]
    for layer in params["layers"]:
        qkv = jnp.einsum("bld,dthk->tblhk", rms_norm(x, layer["norm_1"]), layer["qkv"])
        attended = jax.nn.dot_product_attention(*qkv, is_causal=True)
        x += jnp.einsum("blhk,hkd->bld", attended, layer["out"])
        x += jax.nn.gelu(rms_norm(x, layer["norm_2"]) @ layer["up"]) @ layer["down"]
    return rms_norm(x, params["norm"]) @ params["embedding"].T


# %% [markdown]
# ### Train it and record the curvature
#
# The state of the optimizer has $h$, the average of the estimates. `sophia_optax.diagnostics`
# returns the win rate, `plotting.curvature_quantiles` the quantiles of $h$. Each refresh adds both
# to the records.

# %%
STEPS = 300
schedule = optax.schedules.warmup_cosine_decay_schedule(0, 5e-3, STEPS // 10, STEPS)
tx = sophia_optax.sophia_g(schedule, b1=0.8, gamma=0.1, weight_decay=0.1)


@jax.jit
def train_step(params, state, batch):
    seen, following = batch[:, :-1], batch[:, 1:]

    def loss_fn(params):
        return cross_entropy(transformer(params, seen), following).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    part = sophia_optax.curvature_batch(seen, 8)
    hessian_fn = sophia_optax.gauss_newton_bartlett(lambda p: transformer(p, part), params)
    updates, state = tx.update(grads, state, params, hessian_fn=hessian_fn)
    return optax.apply_updates(params, updates), state, loss


params = init_params(jax.random.key(0))
state = tx.init(params)
print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters")

records, losses = [], []
for step, batch in enumerate(batches(STEPS)):
    params, state, loss = train_step(params, state, batch)
    losses.append(loss)
    if step % 10 == 0:
        win_rate = float(sophia_optax.diagnostics(state).win_rate)
        records.append({"step": step, "win_rate": win_rate})
        records[-1] |= sophia_optax.plotting.curvature_quantiles(state)
    if step % 100 == 99:
        recent = np.mean(losses[-50:])
        print(f"step {step + 1}: loss {recent:.2f} nats a byte, win rate {win_rate:.2f}")

# %%
sophia_optax.plotting.win_rate({"sophia_g": records})

# %% [markdown]
# The win rate is the share of coordinates that are not clipped. The gray band is the range for
# which the paper tunes $\gamma$. Here the win rate falls, because $\gamma$ is fixed and the
# curvature decreases:
#
# ### Follow h over the run

# %%
corrected = []
for refreshes, record in enumerate(records, start=1):
    share = 1 - 0.99**refreshes
    quantiles = {key: value / share for key, value in record.items() if "curvature" in key}
    corrected.append({"step": record["step"], **quantiles})
sophia_optax.plotting.curvature({"h as stored": records, "corrected for its start": corrected})

# %% [markdown]
# Lines are medians, bands reach from the 10 % to the 90 % quantile. The stored $h$ starts at zero
# and gains one per cent of an estimate at a time, so its rise is not a rise of the curvature. The
# update divides it by $1 - \beta_2^n$, as the upper curve does. That curve is the model's
# curvature: it falls as the model learns, and stays spread over orders of magnitude.
#
# ### Split it by kind of parameter

# %%
KINDS = {
    "qkv": "attention",
    "out": "attention",
    "up": "MLP",
    "down": "MLP",
    "norm": "norm",
    "norm_1": "norm",
    "norm_2": "norm",
}


def kind(path):
    name = path[-1].key
    return KINDS.get(name, name)


sophia_optax.plotting.curvature_histogram(state, kind, b2=0.99)

# %% [markdown]
# The axis is logarithmic. Positions and the norms' scales act on many tokens and are the sharpest.
# Most of the MLP is flat. The embedding alone spans decades, because few predictions depend on the
# rows of rare bytes. Attention has several peaks, because it has several parts:

# %%
share = 1 - 0.99 ** int(sophia_optax.diagnostics(state).refreshes)
for number, layer in enumerate(optax.tree.get(state, "nu")["layers"]):
    query, key, value = (layer["qkv"][:, i] for i in range(3))
    for name, h in {"query": query, "key": key, "value": value, "output": layer["out"]}.items():
        low, middle, high = np.quantile(h / share, [0.1, 0.5, 0.9])
        print(f"layer {number} {name:6} 10 % {low:.0e}   median {middle:.0e}   90 % {high:.0e}")

# %% [markdown]
# Plain gradient descent needs a learning rate that suits the sharpest of these parameters, and at
# that rate it hardly moves the flat ones. That is the reason to divide by the curvature. (Adam
# divides by the size of the gradients.) This is one small model and one seed. To see yours, log
# such records and pass them to `sophia_optax.plotting`.
#
# Next: [Sophia and AdamW train a language model](03_train_a_language_model.ipynb).
