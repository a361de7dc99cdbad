"""Sophia, a second-order optimizer for language models, as Optax gradient transformations.

    import jax, optax, sophia_optax

    tx = sophia_optax.sophia_g(learning_rate=1e-3)
    state = tx.init(params)

    @jax.jit
    def train_step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        part = sophia_optax.curvature_batch(batch, 8)
        hessian_fn = sophia_optax.gauss_newton_bartlett(lambda p: logits_fn(p, part), params)
        updates, state = tx.update(grads, state, params, hessian_fn=hessian_fn)
        return optax.apply_updates(params, updates), state, loss

Adapters for Flax are in `sophia_optax.nnx` and `sophia_optax.linen`, which need Flax.
"""

from sophia_optax._alias import PAPER as PAPER
from sophia_optax._alias import sophia_g as sophia_g
from sophia_optax._alias import sophia_h as sophia_h
from sophia_optax._batching import curvature_batch as curvature_batch
from sophia_optax._batching import on_emit as on_emit
from sophia_optax._diagnostics import SophiaDiagnostics as SophiaDiagnostics
from sophia_optax._diagnostics import diagnostics as diagnostics
from sophia_optax._gauss_newton_bartlett import gauss_newton_bartlett as gauss_newton_bartlett
from sophia_optax._hutchinson import hutchinson as hutchinson
from sophia_optax._in_eigenbasis import InEigenbasisState as InEigenbasisState
from sophia_optax._in_eigenbasis import in_eigenbasis as in_eigenbasis
from sophia_optax._likelihoods import bernoulli as bernoulli
from sophia_optax._likelihoods import categorical as categorical
from sophia_optax._likelihoods import gaussian as gaussian
from sophia_optax._matrix_axes import MatrixAxes as MatrixAxes
from sophia_optax._scale_by_sophia import ScaleBySophiaState as ScaleBySophiaState
from sophia_optax._scale_by_sophia import scale_by_sophia as scale_by_sophia
from sophia_optax._types import Coordinates as Coordinates
from sophia_optax._types import HessianFn as HessianFn
from sophia_optax._types import Likelihood as Likelihood
from sophia_optax._win_rate_target import win_rate_target as win_rate_target

__version__ = "0.1.0"
