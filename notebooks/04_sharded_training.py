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
# # Sharded training
#
# [![Open Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
# In Colab, choose File > Upload notebook. The first cell installs what is missing.
#
# This notebook trains a transformer on a mesh of eight devices. It shows how Sophia's state is
# sharded, what a refresh of the curvature communicates, and that the numbers are those of one
# device. The devices are eight parts of a CPU, so it runs anywhere. On a TPU or on GPUs, remove the
# lines that create them.

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
    packages = [SOURCE or found[0], "rich>=13"]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *packages], check=True)
    for name in {"jax", "numpy"} & set(sys.modules):
        if sys.modules[name].__version__ != importlib.metadata.version(name):
            raise SystemExit(f"Installed. {name} was loaded before: restart, and run from the top.")

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sophia_optax

jax.config.update("jax_platforms", "cpu")  # remove these two lines
jax.config.update("jax_num_cpu_devices", 8)  # on a TPU or on GPUs

# %% [markdown]
# ## Make the mesh
#
# It has three axes, as in most trainers:
#
# * `data`: copies of the params, each with its part of the batch;
# * `fsdp`: params and batch are both sharded;
# * `tensor`: heads, hidden features and the vocabulary are sharded; the batch is not.

# %%
AXES = ("data", "fsdp", "tensor")
mesh = jax.make_mesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
print(mesh)

# %% [markdown]
# ## Shard the params
#
# The second table has an entry for each axis of each array in the first.

# %%
LAYERS, WIDTH, HEADS, CONTEXT, VOCABULARY, BATCH = 2, 64, 4, 32, 128, 16

shapes = {
    "embedding": (VOCABULARY, WIDTH),
    "positions": (CONTEXT, WIDTH),
    "norm_1": (LAYERS, WIDTH),
    "qkv": (LAYERS, WIDTH, 3, HEADS, WIDTH // HEADS),
    "out": (LAYERS, HEADS, WIDTH // HEADS, WIDTH),
    "norm_2": (LAYERS, WIDTH),
    "up": (LAYERS, WIDTH, 4 * WIDTH),
    "down": (LAYERS, 4 * WIDTH, WIDTH),
}
specs = {
    "embedding": PartitionSpec("tensor", "fsdp"),
    "positions": PartitionSpec(None, "fsdp"),
    "norm_1": PartitionSpec(None, "fsdp"),
    "qkv": PartitionSpec(None, "fsdp", None, "tensor", None),
    "out": PartitionSpec(None, "tensor", None, "fsdp"),
    "norm_2": PartitionSpec(None, "fsdp"),
    "up": PartitionSpec(None, "fsdp", "tensor"),
    "down": PartitionSpec(None, "tensor", "fsdp"),
}
batch_spec = PartitionSpec(("data", "fsdp"))


def shardings_on(mesh):
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def init_params(key):
    keys = jax.random.split(key, len(shapes))
    return {
        name: jnp.ones(shape) if "norm" in name else 0.08 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


# %% [markdown]
# The model is written as for one device. XLA derives from the shardings what each device computes.


# %%
def rms_norm(x, scale):
    return scale * x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def logits_fn(params, tokens):
    stacked = {name: x for name, x in params.items() if x.shape[0] == LAYERS}

    def block(x, layer):
        qkv = jnp.einsum("bld,dthk->tblhk", rms_norm(x, layer["norm_1"]), layer["qkv"])
        attended = jax.nn.dot_product_attention(*qkv, is_causal=True)
        x += jnp.einsum("blhk,hkd->bld", attended, layer["out"])
        x += jax.nn.gelu(rms_norm(x, layer["norm_2"]) @ layer["up"]) @ layer["down"]
        return x, None

    x = params["embedding"][tokens] + params["positions"]
    x, _ = jax.lax.scan(block, x, stacked)
    return rms_norm(x, 1.0) @ params["embedding"].T


def loss_fn(params, batch):
    logits = logits_fn(params, batch[:, :-1])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


# %% [markdown]
# ## Write the step
#
# `curvature_batch` selects every fourth sequence: each device keeps some of its own, and no data
# move. `tx.init` under `jit` makes the state. $m$ and $h$ have the shardings of the params, leaf by
# leaf.

# %%
tx = sophia_optax.sophia_g(5e-3, b1=0.9, gamma=0.1, update_interval=5)


def train_step(params, state, batch, refresh=None):
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    part = sophia_optax.curvature_batch(batch, BATCH // 4)
    hessian_fn = sophia_optax.gauss_newton_bartlett(lambda p: logits_fn(p, part[:, :-1]), params)
    updates, state = tx.update(grads, state, params, hessian_fn=hessian_fn, refresh=refresh)
    return optax.apply_updates(params, updates), state, loss


def setup(mesh):
    """Sharded params, sharded state, and the compiled step."""
    params = jax.jit(init_params, out_shardings=shardings_on(mesh))(jax.random.key(0))
    state = jax.jit(tx.init)(params)
    here = jax.tree.map(lambda x: x.sharding, (params, state))
    step = jax.jit(
        train_step,
        donate_argnums=(0, 1),
        static_argnums=3,
        out_shardings=(*here, NamedSharding(mesh, PartitionSpec())),
    )
    return params, state, step


params, state, step = setup(mesh)

# %% [markdown]
# ## See where m and h are
#
# `up` of the first layer: its rows are sharded over `fsdp` and its columns over `tensor`. Each part
# has a copy for each index of `data`.

# %%
jax.debug.visualize_array_sharding(params["up"][0], scale=0.8)

# %% [markdown]
# Its curvature:

# %%
h = optax.tree.get(state, "nu")
jax.debug.visualize_array_sharding(h["up"][0], scale=0.8)

# %%
m = optax.tree.get(state, "mu")
for name, param in params.items():
    assert m[name].sharding.is_equivalent_to(param.sharding, param.ndim)
    assert h[name].sharding.is_equivalent_to(param.sharding, param.ndim)
    part = param.addressable_shards[0].data
    print(f"{name:10} {param.shape!s:18} {part.shape!s:18} on each device, for m and h as well")

# %% [markdown]
# ## Train, and compare with one device


# %%
def batch_number(i, mesh):
    """Sequences that count upwards in steps of 1 to 4, modulo the vocabulary."""
    rng = np.random.default_rng(i)
    start, stride = rng.integers(0, VOCABULARY, BATCH), rng.integers(1, 5, BATCH)
    tokens = (start[:, None] + stride[:, None] * np.arange(CONTEXT + 1)) % VOCABULARY
    return jax.device_put(tokens, NamedSharding(mesh, batch_spec))


def train(params, state, step, mesh, steps=30):
    losses = []
    for i in range(steps):
        params, state, loss = step(params, state, batch_number(i, mesh))
        losses.append(float(loss))  # waits, which devices that a CPU simulates need
    return params, state, np.array(losses)


one_device = jax.make_mesh(
    (1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
)
params, state, losses = train(params, state, step, mesh)
_, state_of_one, losses_of_one = train(*setup(one_device), one_device)

for i in (0, 9, 19, 29):
    print(f"step {i:2}: 8 devices {losses[i]:.5f}, 1 device {losses_of_one[i]:.5f}")
seen, seen_of_one = map(sophia_optax.diagnostics, (state, state_of_one))
print(f"win rate: 8 devices {seen.win_rate:.4f}, 1 device {seen_of_one.win_rate:.4f}")
np.testing.assert_allclose(losses, losses_of_one, rtol=1e-3)

# %% [markdown]
# Both are the same to rounding, the curvature included: the random numbers of an estimate depend on
# the seed and the step, not on the devices.
#
# ## Count what a refresh communicates
#
# `refresh=` fixes at compile time whether the step refreshes. So both kinds can be compiled, and
# their collectives counted in XLA's program. The size of their results is in brackets.

# %%
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def collectives(compiled):
    """The count of each collective in a program, and the size of their results."""
    found = {}
    for made, kind in re.findall(rf"= (\S.*?) ({KINDS})(?:-start)?\(", compiled.as_text()):
        arrays = re.findall(r"\w+\[([\d,]*)\]", made)
        numbers = sum(math.prod(int(n) for n in a.split(",") if n) for a in arrays)
        count, total = found.get(kind, (0, 0))
        found[kind] = (count + 1, total + numbers)
    return found


def show(without, with_refresh):
    print(f"{'':20}{'without':>18}{'with a refresh':>18}")
    for kind in sorted({*without, *with_refresh}):
        cells = (f"{c} ({n:,})" for c, n in (x.get(kind, (0, 0)) for x in (without, with_refresh)))
        print(f"{kind:20}" + "".join(f"{cell:>18}" for cell in cells))


batch = batch_number(0, mesh)
programs = [step.lower(params, state, batch, refresh).compile() for refresh in (False, True)]
show(*map(collectives, programs))

# %% [markdown]
# A refresh runs the model forwards and backwards once more, on a quarter of the batch. Nearly all
# new collectives belong to that pass. (A collective in the scan over the layers counts once and
# runs for each layer.) Sophia itself adds almost nothing, as the update alone shows, with a given
# estimate:


# %%
def update_alone(params, state, grads, estimate, refresh):
    updates, state = tx.update(
        grads, state, params, hessian_fn=lambda key: estimate, refresh=refresh
    )
    return optax.apply_updates(params, updates), state


here = jax.tree.map(lambda x: x.sharding, (params, state))
alone = jax.jit(update_alone, static_argnums=4, out_shardings=here)
arguments = (params, state, params, params)
programs = [alone.lower(*arguments, refresh).compile() for refresh in (False, True)]
show(*map(collectives, programs))

# %% [markdown]
# These are a few all-reduces of a handful of numbers: the counts for the win rate, which also show
# whether the estimate is finite. Without a refresh the update communicates nothing.
# (`tests/library/test_sharding.py` tests both, on four layouts.)
#
# ## Move to a TPU pod
#
# The same program runs on a pod. Three things change, none of them in the step:
#
# 1. **The launch.** Every host runs the same script. On Cloud TPU, from your machine:
#
#    ```sh
#    gcloud compute tpus tpu-vm ssh $NAME --worker=all --command="python train.py"
#    ```
#
# 2. **The first lines.** Instead of the two that create CPU devices:
#
#    ```python
#    jax.distributed.initialize()  # reads the hosts from the pod
#    mesh = jax.make_mesh((jax.device_count() // 8, 8, 1), AXES, axis_types=(AxisType.Auto,) * 3)
#    ```
#
# 3. **The batch.** Each host loads its own rows, and
#    `jax.make_array_from_process_local_data(sharding, rows)` makes one global array of them.
#
# `examples/lm` in the repository is such a script, tested with two processes: `python -m
# examples.lm train --hosts.auto --mesh.fsdp 8`. `python -m examples.lm plan` computes its cost on a
# pod ahead of time, without a TPU.
