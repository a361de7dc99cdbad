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
# (upload this file there; the first cell installs what is missing)
#
# Sophia divides by the diagonal of the loss's second derivative, which nobody can afford to
# compute for a large model. Two estimators stand in for it. Here they are held against the exact
# diagonal of a small network. Then a small transformer shows what Sophia lives on: its curvature
# spans many orders of magnitude.

# %%
import importlib.util
import subprocess
import sys

PACKAGE = "sophia_optax[plotting]"  # or the path of a wheel
if importlib.util.find_spec("sophia_optax") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", PACKAGE], check=True)

import sysconfig
from pathlib import Path

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
# ## A network small enough for the exact answer
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
# There are two matrices to take the diagonal of. With $f$ the logits, $J$ their Jacobian and $H_f$
# the second derivative of the cross-entropy in them, the Hessian is
#
# $$\nabla^2 L = \underbrace{\operatorname{mean}_i J_i^\top H_{f,i}\, J_i}_{\text{Gauss-Newton}}
# + \underbrace{\operatorname{mean}_i \textstyle\sum_c
# \frac{\partial \ell_i}{\partial f_{ic}} \nabla^2 f_{ic}}_{\text{the network's own bends}}$$
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
# ## Two estimators
#
# **Hutchinson** (Sophia-H) aims at the Hessian: random signs $u$, and $u \odot (\nabla^2 L\, u)$.
# It needs a loss that can be differentiated twice.
#
# **Gauss-Newton-Bartlett** (Sophia-G) aims at the Gauss-Newton diagonal. It draws labels from the
# model's own prediction, takes the gradient on them and squares it. First derivatives will do, and
# the estimate is never negative. The library calls it with the logits, and scales it so that no
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
# One probe is a poor picture of any single coordinate, and that is what training uses: the
# optimizer averages over refreshes, with decay `b2=0.99` at each, so that about a hundred of them
# count. The lower row shows what a hundred at one place are worth.
#
# ## How the error falls
#
# The estimators are unbiased, so averaging $n$ draws divides the variance by $n$. The relative
# error $\lVert \hat h - h \rVert / \lVert h \rVert$ falls as $1 / \sqrt n$, the gray line. To see
# it, draw 1024 estimates of one probe each, and average them in groups of $n$. On the right the
# estimates see a part of the batch only, while the exact diagonal stays that of all of it.


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
# On the right is the reason why the curvature may be taken on a part of the batch. With one probe
# (solid lines), the error hardly depends on the number of examples: it is the noise of the probe,
# and more data do not remove it. Only for many probes (dashed) does the data's share show.
#
# So a refresh on a part of the batch is nearly as good and costs that part. The paper takes 32 of
# 480 sequences for Sophia-H and 240 for Sophia-G. `sophia_optax.curvature_batch(batch, size)`
# takes one without moving data between devices.
#
# ## A transformer
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
# ### Training it, with an eye on the curvature
#
# The state of the optimizer holds $h$, the average of the estimates. `sophia_optax.diagnostics`
# reads the win rate off it, `plotting.curvature_quantiles` the spread of $h$. Both go into
# records, one for each refresh.

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
# The win rate is the share of coordinates that take a step of their own length. The gray band is
# what the paper tunes $\gamma$ for. Here it falls, since $\gamma$ stays and the curvature becomes
# smaller:
#
# ### The drift of h

# %%
corrected = []
for refreshes, record in enumerate(records, start=1):
    share = 1 - 0.99**refreshes
    quantiles = {key: value / share for key, value in record.items() if "curvature" in key}
    corrected.append({"step": record["step"], **quantiles})
sophia_optax.plotting.curvature({"h as stored": records, "corrected for its start": corrected})

# %% [markdown]
# Lines are medians, bands reach from the 10 % to the 90 % quantile. The $h$ that is stored starts
# at zero and gains one per cent of an estimate at a time, so its rise is no curvature at all. The
# update divides it by $1 - \beta_2^n$, as in the upper curve, which is what the model's curvature
# does: it falls as the model learns, and stays spread over orders of magnitude.
#
# ### The spectrum, by kind of parameter

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
# The axis is logarithmic. Positions and the norms' scales act on many tokens and are the sharpest;
# most of the MLP is flat; and the embedding alone spans decades, as few predictions depend on the
# rows of rare bytes. Attention has several humps, because it has several parts:

# %%
share = 1 - 0.99 ** int(sophia_optax.diagnostics(state).refreshes)
for number, layer in enumerate(optax.tree.get(state, "nu")["layers"]):
    query, key, value = (layer["qkv"][:, i] for i in range(3))
    for name, h in {"query": query, "key": key, "value": value, "output": layer["out"]}.items():
        low, middle, high = np.quantile(h / share, [0.1, 0.5, 0.9])
        print(f"layer {number} {name:6} 10 % {low:.0e}   median {middle:.0e}   90 % {high:.0e}")

# %% [markdown]
# One learning rate has to suit the sharpest of all these, and at that rate plain gradient descent
# hardly moves the flat ones. That is the case for dividing by the curvature. (Adam divides as well,
# by the size of the gradients.) This is one small model and one seed; to see yours, log such
# records and call `sophia_optax.plotting` on them.
#
# Next: [Sophia and AdamW train a language model](03_train_a_language_model.ipynb).
