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
# # Train a language model
#
# [![Open Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
# In Colab, choose File > Upload notebook. The first cell installs what is missing.
#
# This notebook trains a transformer in Flax NNX on Python's standard library, byte by byte, with
# AdamW and with Sophia-G. Then it sweeps $\gamma$, and lets a win-rate target choose it.
#
# **A short run of one seed decides nothing.** This notebook shows how to use Sophia, not whether it
# is better. [Benchmarks](../docs/benchmarks.md) has comparisons with tuning and several seeds.

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
    packages = [SOURCE or found[0], "flax>=0.12.7", "matplotlib>=3.9"]
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
from flax import nnx

import sophia_optax
import sophia_optax.nnx
import sophia_optax.plotting

# %% [markdown]
# ## Data
#
# The modules at the top of the standard library, as bytes. Every tenth file is held out. (They
# differ between versions of Python, so your losses will differ slightly from those below.)

# %%
VOCABULARY, CONTEXT, BATCH = 128, 48, 16

files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
texts = {
    "train": b"".join(path.read_bytes() for i, path in enumerate(files) if i % 10),
    "validation": b"".join(path.read_bytes() for path in files[::10]),
}
tokens = {
    name: np.minimum(np.frombuffer(text, np.uint8), VOCABULARY - 1).astype(np.int32)
    for name, text in texts.items()
}
print({name: f"{len(text):,} bytes" for name, text in tokens.items()})


def windows(split, starts):
    return jnp.asarray(tokens[split][starts[:, None] + np.arange(CONTEXT + 1)])


def batches(steps, seed=0):
    """The same batches for every optimizer."""
    last = len(tokens["train"]) - CONTEXT - 1
    for starts in np.random.default_rng(seed).integers(0, last, (steps, BATCH)):
        yield windows("train", starts)


held_out = windows("validation", np.linspace(0, len(tokens["validation"]) - 99, 256).astype(int))

# %% [markdown]
# ## Model
#
# Letters at the end of a name are its axes: B batch, L length, D width, H heads, K features of a
# head.


# %%
class Block(nnx.Module):
    def __init__(self, width, heads, rngs):
        self.heads = heads
        self.norm_1 = nnx.RMSNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.norm_2 = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x_BLD):
        batch, length, width = x_BLD.shape
        qkv_BLHK = self.qkv(self.norm_1(x_BLD)).reshape(batch, length, 3, self.heads, -1)
        attended_BLHK = jax.nn.dot_product_attention(
            *(qkv_BLHK[:, :, i] for i in range(3)), is_causal=True
        )
        x_BLD += self.out(attended_BLHK.reshape(batch, length, width))
        return x_BLD + self.down(jax.nn.gelu(self.up(self.norm_2(x_BLD))))


class Transformer(nnx.Module):
    def __init__(self, rngs, width=48, heads=4, layers=2):
        self.embedding = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.positions = nnx.Embed(CONTEXT, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens_BL):
        x_BLD = self.embedding(tokens_BL) + self.positions(jnp.arange(tokens_BL.shape[1]))
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return self.head(self.norm(x_BLD))


def loss_fn(model, batch):
    logits = model(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


model = Transformer(nnx.Rngs(0))
print(f"{sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))):,} parameters")

# %% [markdown]
# ## Write the step
#
# AdamW's step is that of any NNX tutorial. Sophia adds three lines: a part of the batch, the model
# as a function of its params, and the estimator. `update` calls the estimator on every tenth step
# only.


# %%
@nnx.jit
def adamw_step(model, optimizer, batch):
    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def sophia_step(model, optimizer, batch):
    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    part = sophia_optax.curvature_batch(batch[:, :-1], BATCH // 2)
    logits_fn, params = sophia_optax.nnx.functional_outputs(model, lambda m, x: m(x), part)
    hessian_fn = sophia_optax.gauss_newton_bartlett(logits_fn, params)
    optimizer.update(model, grads, hessian_fn=hessian_fn)
    return loss


validate = nnx.jit(loss_fn)
STEPS = 250


def train(name, tx, seed=0):
    """Trains a new model; returns it and a record for every tenth step."""
    model = Transformer(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    train_step = adamw_step if name == "AdamW" else sophia_step
    records, recent = [], []
    for step, batch in enumerate(batches(STEPS)):
        recent.append(train_step(model, optimizer, batch))
        if step % 10 == 0:
            records.append({"step": step, "loss": float(np.mean(recent))})
            recent = []
            if name != "AdamW":
                seen = sophia_optax.diagnostics(optimizer.opt_state)
                records[-1] |= {"win_rate": float(seen.win_rate), "gamma": float(seen.gamma)}
    records.append({"step": STEPS, "validation": float(validate(model, held_out))})
    print(f"{name}: validation loss {records[-1]['validation']:.3f} nats a byte")
    return model, records


def schedule(peak, warmup):
    return optax.schedules.warmup_cosine_decay_schedule(0, peak, int(warmup * STEPS), STEPS)


# %% [markdown]
# The rates are the best of a few around those that a search found for a similar model
# (`benchmarks/results/lm_tuning.jsonl`). AdamW needs a larger one, Sophia a longer warm-up.


# %%
def sophia(gamma):
    return sophia_optax.sophia_g(schedule(7e-3, 0.2), b1=0.8, gamma=gamma, weight_decay=0.1)


adamw = optax.adamw(schedule(1e-2, 0.1), b1=0.8, b2=0.95, weight_decay=0.1)

runs, models = {}, {}
for name, tx in {"AdamW": adamw, "Sophia-G": sophia(gamma=0.2)}.items():
    models[name], runs[name] = train(name, tx)

# %%
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
for name, records in runs.items():
    points = [(record["step"], record["loss"]) for record in records if "loss" in record]
    axes.plot(*zip(*points, strict=True), label=name)
axes.set(xlabel="step", ylabel="training loss, nats a byte", title=f"one seed, {STEPS} steps")
axes.legend()
plt.show()

# %% [markdown]
# After the warm-up the two curves are close to each other.
#
# ## Sample from it


# %%
@nnx.jit
def next_byte(model, window, last, key):
    return jax.random.categorical(key, model(window[None])[0, last] / 0.7)


def generate(model, prompt, count=160):
    text = list(prompt.encode())
    for key in jax.random.split(jax.random.key(0), count):
        seen = text[-CONTEXT:]
        window = np.zeros(CONTEXT, np.int32)
        window[: len(seen)] = seen
        text.append(int(next_byte(model, window, len(seen) - 1, key)))
    return bytes(text).decode()


print(generate(models["Sophia-G"], "def "))

# %% [markdown]
# After 250 small batches it has learned spaces, underscores and the length of words, but not the
# words.
#
# ## Sweep gamma
#
# A coordinate is clipped where $|m| \ge \gamma h$. So $\gamma$ controls the **win rate**, which is
# the share of coordinates that are not clipped. The paper tunes $\gamma$ until the win rate is
# between 0.1 and 0.5:

# %%
sweep = {"γ = 0.2": runs["Sophia-G"]}
for gamma in (0.01, 1.0):
    _, sweep[f"γ = {gamma}"] = train(f"γ = {gamma}", sophia(gamma))
sophia_optax.plotting.win_rate(sweep)

# %% [markdown]
# With a small $\gamma$ most coordinates are clipped, and Sophia is close to a sign method. With a
# large one few are: the steps $\eta\, m / (\gamma h)$ shrink, and the clip has little effect.
#
# ## Let a target choose gamma
#
# The $\gamma$ for a given win rate changes with the batch size and over the run. With
# `win_rate_target(0.5)` instead of a number, each refresh sets the $\gamma$ of each parameter so
# that half of its coordinates are not clipped:

# %%
_, tuned = train("self-tuned", sophia(gamma=sophia_optax.win_rate_target(0.5)))
sophia_optax.plotting.win_rate({"self-tuned": tuned, "γ = 0.2": runs["Sophia-G"]})

# %%
sophia_optax.plotting.gamma({"self-tuned": tuned, "γ = 0.2": runs["Sophia-G"]})

# %% [markdown]
# $\gamma$ changes by a factor of several over the run, so no fixed number would keep the win rate.
# The losses of all runs:

# %%
everything = {"AdamW": runs["AdamW"], **sweep, "self-tuned": tuned}
for name, records in everything.items():
    print(f"{name:12} validation loss {records[-1]['validation']:.3f}")

# %% [markdown]
# Do not choose an optimizer by this table: it is one seed, 250 steps, and a learning rate that
# suits one $\gamma$ and not another. [Benchmarks](../docs/benchmarks.md) has tuned comparisons over
# seeds.
#
# `python -m examples.lm` in the repository is a trainer to build on, with data pipelines,
# checkpoints, several devices and hosts. Next: [the same on many
# devices](04_sharded_training.ipynb).
