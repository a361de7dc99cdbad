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
# # Sophia from scratch
#
# [![Open Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
# In Colab, choose File > Upload notebook. The first cell installs what is missing.
#
# Sophia divides the momentum by an estimate of the curvature and clips the result. This notebook
# writes it in thirty lines of JAX, checks them against the library, and plots it on a landscape of
# two parameters on which SGD, SignSGD, Adam and Newton's method each have a difficulty.
#
# The paper: [Liu, Li, Hall, Liang and Ma 2023](https://arxiv.org/abs/2305.14342).

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

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import sophia_optax

# %% [markdown]
# ## The landscape
#
# The paper's example, from its Section 2:
#
# $$L(\theta) = \underbrace{8(\theta_1 - 1)^2 (1.3\,\theta_1^2 + 2\theta_1 + 1)}_{L_1(\theta_1)}
# + \underbrace{\tfrac12(\theta_2 - 4)^2}_{L_2(\theta_2)}$$
#
# It is small enough to plot, and has two difficulties in common with a language model's loss:
#
# * **The curvature differs between the coordinates.** At the minimum, $(1, 4)$, it is about 69
#   along $\theta_1$ and 1 along $\theta_2$.
# * **The curvature is negative in places.** Between $-0.37$ and $0.60$, $L_1$ bends downwards; at
#   $\theta_1 = 0$ it has a local maximum, so $(0, 4)$ is a saddle.


# %%
def loss_fn(theta):
    x, y = theta
    return 8 * (x - 1) ** 2 * (1.3 * x**2 + 2 * x + 1) + 0.5 * (y - 4) ** 2


for point in ([1.0, 4.0], [0.0, 4.0], [0.2, 0.0]):
    theta = jnp.array(point)
    curvature = jnp.diag(jax.hessian(loss_fn)(theta))
    print(f"at {point}: loss {loss_fn(theta):5.2f}, curvature along each axis {curvature}")

# %% [markdown]
# ## The algorithm
#
# With $t$ counting from 0:
#
# $$\begin{aligned}
# m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
# h_t &= \beta_2 h_{t-1} + (1 - \beta_2)\, \hat h(\theta_t)
#        \quad\text{every } k \text{ steps, else } h_{t-1} \\
# u_t &= \operatorname{clip}\!\left(
#        \frac{m_t}{\max(\gamma\, \bar h_t,\ \epsilon)},\ \pm\rho\right) \\
# \theta_{t+1} &= \theta_t - \eta\,(u_t + \lambda\, \theta_t)
# \end{aligned}$$
#
# $\bar h = h / (1 - \beta_2^n)$ corrects for $h$ having started at zero, $n$ refreshes ago. (The
# paper does not correct it; `bias_correction=False` is the paper's. The library also uses $|h|$
# instead of $h$; `absolute_curvature=False` is the paper's.)
#
# $\hat h$ is an estimate of the Hessian's diagonal. Hutchinson's takes random signs $u$ and returns
# $u \odot (\nabla^2 L\, u)$. Its mean is the diagonal, and the product with $u$ costs a few
# gradients. The Hessian is never formed.


# %%
def hutchinson(loss_fn, params, key):
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    signs = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    u = structure.unflatten(signs)
    _, hessian_times_u = jax.jvp(jax.grad(loss_fn), (params,), (u,))
    return jax.tree.map(jnp.multiply, u, hessian_times_u)


def sophia(loss_fn, params, steps, lr, b1, b2, gamma, k=10, rho=1.0, eps=1e-12, decay=1e-4):
    """Returns the params after every step, the first ones included."""
    grad_fn = jax.jit(jax.grad(loss_fn))
    estimate = jax.jit(lambda params, key: hutchinson(loss_fn, params, key))

    def clipped(m, h, n):
        scale = gamma / (1 - b2**n)
        return jax.tree.map(lambda m, h: jnp.clip(m / jnp.maximum(scale * h, eps), -rho, rho), m, h)

    m = h = jax.tree.map(jnp.zeros_like, params)
    n, path = 0, [params]
    for t in range(steps):
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, grad_fn(params))
        if t % k == 0:
            new = estimate(params, jax.random.fold_in(jax.random.key(0), t))
            h = jax.tree.map(lambda h, e: b2 * h + (1 - b2) * e, h, new)
            n += 1
        params = jax.tree.map(lambda p, u: p - lr * (u + decay * p), params, clipped(m, h, n))
        path.append(params)
    return path


# %% [markdown]
# ## The library, on the same problem
#
# `sophia_optax.sophia_h` is an Optax transformation. Its `update` has one more argument: a function
# that estimates the curvature, which it calls when a refresh is due. This function returns the
# trajectory of any optimizer:


# %%
def trajectory(tx, loss_fn, params, steps):
    """Returns the params after every step, for an optimizer from Optax or from sophia_optax."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def train_step(params, state):
        hessian_fn = sophia_optax.hutchinson(loss_fn, params)
        grads = jax.grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, hessian_fn=hessian_fn)
        return optax.apply_updates(params, updates), state

    state, path = tx.init(params), [params]
    for _ in range(steps):
        params, state = train_step(params, state)
        path.append(params)
    return path


def compare(name, loss_fn, params, lr, steps=60):
    hyperparameters = {"b1": 0.9, "b2": 0.8, "gamma": 0.5}
    ours = sophia(loss_fn, params, steps, lr, **hyperparameters)
    tx = sophia_optax.sophia_h(lr, absolute_curvature=False, **hyperparameters)
    theirs = trajectory(tx, loss_fn, params, steps)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    print(f"{name}: {steps} equal steps, loss {loss_fn(ours[0]):.2f} -> {loss_fn(ours[-1]):.2f}")


start = jnp.array([0.2, 0.0])
compare("the landscape", loss_fn, start, lr=0.1)

# %% [markdown]
# On that landscape the Hessian is diagonal, and any signs give its diagonal exactly. A small
# network is a harder check. Its parameters are coupled, so the estimates are noisy, and the
# trajectories agree only if both draw the same signs. They do, because the library derives its keys
# from a seed and the step's number too. (So no key has to be saved, and a resumed run draws the
# same signs.)

# %%
rng = np.random.default_rng(0)
inputs = rng.normal(size=(64, 3)).astype(np.float32)
targets = np.sin(inputs.sum(axis=1, keepdims=True))
network = {
    "w1": rng.normal(size=(3, 8)).astype(np.float32),
    "b1": np.zeros(8, np.float32),
    "w2": rng.normal(size=(8, 1)).astype(np.float32),
}


def network_loss(params):
    hidden = jnp.tanh(inputs @ params["w1"] + params["b1"])
    return jnp.mean((hidden @ params["w2"] - targets) ** 2)


network = jax.tree.map(jnp.asarray, network)
compare("a network", network_loss, network, lr=0.02)

# %% [markdown]
# ## Compare five optimizers
#
# All start at $(0.2, 0)$, where $L_1$ bends downwards. The rates are chosen for the picture: SGD's
# is about one over the larger curvature, the others' is 0.3. Only Adam has momentum. With
# $\gamma = \eta$, an unclipped step of Sophia is a Newton step, $g / h$. A clipped step has length
# $\eta$ in its coordinate.


# %%
def newton(steps):
    gradient = jax.grad(loss_fn)
    step = jax.jit(lambda theta: theta - gradient(theta) / jnp.diag(jax.hessian(loss_fn)(theta)))
    path = [start]
    for _ in range(steps):
        path.append(step(path[-1]))
    return path


STEPS, RATE = 30, 0.3
papers = {"b1": 0.0, "b2": 0.0, "update_interval": 1, "weight_decay": 0.0}
papers["absolute_curvature"] = False  # the library's default steps by |h|: see its documentation
one_sophia = sophia_optax.sophia_h(RATE, gamma=RATE, **papers)
paths = {
    "SGD": trajectory(optax.sgd(0.015), loss_fn, start, STEPS),
    "SignSGD": trajectory(optax.sign_sgd(RATE), loss_fn, start, STEPS),
    "Adam": trajectory(optax.adam(RATE), loss_fn, start, STEPS),
    "Newton": newton(STEPS),
    "Sophia": trajectory(one_sophia, loss_fn, start, STEPS),
}
paths = {name: np.array(path) for name, path in paths.items()}

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
x, y = np.meshgrid(np.linspace(-0.9, 1.7, 200), np.linspace(-0.6, 5, 200))
left.contour(x, y, loss_fn((x, y)), levels=np.geomspace(0.1, 60, 14), colors="0.8", linewidths=1)
for name, path in paths.items():
    bold = name == "Sophia"
    left.plot(*path.T, ".-", label=name, linewidth=2.5 if bold else 1.2, zorder=3 if bold else 2)
    right.plot([loss_fn(theta) for theta in path], label=name, linewidth=2.5 if bold else 1.2)
left.plot(1, 4, "k*", markersize=14, label="minimum", zorder=4)
left.plot(0, 4, "kx", markersize=10, label="saddle", zorder=4)
left.set(xlabel=r"$\theta_1$ (sharp)", ylabel=r"$\theta_2$ (flat)", title="where they go")
right.set(xlabel="step", ylabel="loss", yscale="log", ylim=(1e-6, 30), title="how fast")
left.legend(loc="upper left", fontsize="small")
plt.show()

for name, path in paths.items():
    x, y = path[-1]
    print(f"{name:8} after {STEPS} steps: ({x:5.2f}, {y:5.2f}), loss {loss_fn(path[-1]):.1e}")

# %% [markdown]
# * **SGD** has one rate for both coordinates. The sharp one allows at most $2/69$, and at such a
#   rate the flat one is slow.
# * **SignSGD** and **Adam** move about equally far in both. At this rate they oscillate in the
#   sharp one. A smaller or decaying rate would prevent that, and slow down the flat one.
# * **Newton's method** divides by the curvature, so both coordinates arrive together. Where the
#   curvature is negative its step points uphill, and it ends in the saddle.
# * **Sophia** takes a sign step where the curvature is negative or the quotient large, and is
#   Newton's method near the minimum.
#
# ## See why Sophia clips
#
# How far does each method step along $\theta_1$, from each point?

# %%
slope = jax.vmap(jax.grad(lambda x: loss_fn((x, 4.0))))
bend = jax.vmap(jax.grad(jax.grad(lambda x: loss_fn((x, 4.0)))))

x = jnp.linspace(-0.9, 1.5, 1201)
newton_step = -slope(x) / bend(x)
sophia_step = -RATE * jnp.clip(slope(x) / jnp.maximum(RATE * bend(x), 1e-12), -1, 1)

figure, (top, bottom) = plt.subplots(
    2, 1, figsize=(8, 5.5), sharex=True, layout="constrained", height_ratios=(1, 1.4)
)
top.plot(x, loss_fn((x, 4.0)), "k")
top.set(ylabel="$L_1$", title="in gray, the curvature is negative")
bottom.plot(x, jnp.where(jnp.abs(newton_step) < 3, newton_step, jnp.nan), label="Newton's step")
bottom.plot(x, sophia_step, label="Sophia's step", linewidth=2.5)
bottom.axhline(0, color="k", linewidth=0.8)
bottom.set(xlabel=r"$\theta_1$", ylabel=r"step along $\theta_1$", ylim=(-1.5, 1.5))
bottom.legend(loc="lower left")
for axes in (top, bottom):
    axes.fill_between(
        x, 0, 1, where=bend(x) < 0, color="0.85", transform=axes.get_xaxis_transform(), zorder=0
    )
plt.show()

# %% [markdown]
# Newton's step is right near a minimum, where the two curves agree. Elsewhere it fails in two ways:
#
# 1. **In the gray band it has the wrong sign**: it leads to the maximum at 0. Sophia uses
#    $\max(\gamma h, \epsilon)$ instead of a negative curvature. The quotient is then huge, with the
#    sign of the gradient, and the clip reduces it to a step of length $\eta$.
# 2. **At the band's edges it has no bound**, because the curvature passes through zero. There only
#    the clip bounds Sophia's step.
#
# $\theta_1$ over four steps, with the clip and without it:

# %%
no_clip = sophia_optax.sophia_h(RATE, gamma=RATE, clip_threshold=None, **papers)
for name, tx in {"clipped": one_sophia, "not clipped": no_clip}.items():
    print(f"{name:12}", *(f"{theta[0]:9.3g}" for theta in trajectory(tx, loss_fn, start, 4)))

# %% [markdown]
# ## Turn the axes
#
# On the landscape above, the sharp and the flat direction lie along the coordinates. Across them, a
# diagonal says little. Here is a quadratic with curvatures 100 and 1 whose valley is turned by 0.6
# radians; the two numbers are a matrix of 1 x 2. Every entry of its diagonal is dominated by the
# sharp direction:

# %%
turn = np.array([[np.cos(0.6), -np.sin(0.6)], [np.sin(0.6), np.cos(0.6)]])
hessian = jnp.array(turn @ np.diag([1.0, 100.0]) @ turn.T, jnp.float32)


def valley_fn(w):
    return 0.5 * jnp.sum((w @ hessian) * w)


print("the Hessian:", *hessian, sep="\n")

# %% [markdown]
# With `eigenbasis=True`, each matrix takes its steps in the eigenvectors of its gradients' second
# moments. This is the library's and not the paper's. Here they turn into the axes of the valley.
# Hutchinson's estimator works in the turned coordinates, and the call stays the same.
# `basis_interval` is how often the basis is refreshed; the default is every tenth step.

# %%
quiet = {"b1": 0.0, "gamma": 1.0, "update_interval": 1, "weight_decay": 0.0}
ways = {
    "coordinate-wise": sophia_optax.sophia_h(0.1, **quiet),
    "in the eigenbasis": sophia_optax.sophia_h(0.1, eigenbasis={"basis_interval": 1}, **quiet),
}
far = jnp.array([[-2.0, 1.5]])
ways = {name: trajectory(tx, valley_fn, far, 60) for name, tx in ways.items()}

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
x, y = np.meshgrid(np.linspace(-2.4, 1.2, 200), np.linspace(-1.0, 1.8, 200))
levels = 0.5 * jnp.einsum("...i,ij,...j", jnp.stack([x, y], -1), hessian, jnp.stack([x, y], -1))
left.contour(x, y, levels, levels=np.geomspace(0.1, 500, 12), colors="0.8", linewidths=1)
for name, path in ways.items():
    left.plot(*np.array(path)[:, 0].T, ".-", label=name, linewidth=1.5)
    right.plot([valley_fn(w) for w in path], label=name, linewidth=2)
left.plot(0, 0, "k*", markersize=14)
left.set(title="where they go")
right.set(xlabel="step", ylabel="loss", yscale="log", title="how fast")
left.legend(loc="lower left")
plt.show()

for name, path in ways.items():
    print(f"{name:17} after 60 steps: loss {valley_fn(path[-1]):.1e}")

# %% [markdown]
# The coordinate-wise steps are faster down the slope. In the valley each of their two coordinates
# is divided by the sharp curvature, and they nearly stop. In the eigenbasis only the sharp
# direction is. [The page on the eigenbasis](../docs/concepts/eigenbasis.md) has the algorithm, and
# the Hessian of a layer in both bases.
#
# ## Read the win rate
#
# The **win rate** is the share of coordinates that are *not* clipped. `diagnostics` reads it from
# the state of any Optax chain:


# %%
@jax.jit
def train_step(theta, state):
    hessian_fn = sophia_optax.hutchinson(loss_fn, theta)
    grads = jax.grad(loss_fn)(theta)
    updates, state = one_sophia.update(grads, state, theta, hessian_fn=hessian_fn)
    return optax.apply_updates(theta, updates), state


theta, state = start, one_sophia.init(start)
for step in range(14):
    theta, state = train_step(theta, state)
    x, y = theta
    win_rate = sophia_optax.diagnostics(state).win_rate
    print(f"step {step:2}: to ({x:.2f}, {y:.2f}), win rate {win_rate:.1f}")

# %% [markdown]
# First both coordinates are clipped, then only the flat one, and the last steps are Newton steps.
# In a large model on mini-batches many coordinates stay clipped. The paper tunes $\gamma$ until 0.1
# to 0.5 of them are not.
#
# Next: [the estimators, and the curvature of a transformer](02_curvature.ipynb).
