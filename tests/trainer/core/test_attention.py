"""The fused attention kernel: who runs on it, who goes around it, and who is told."""

import dataclasses

import jax
import numpy as np
import pytest
from rich.console import Console

from examples.lm import compare, data
from examples.lm.config import MODELS, TrainConfig
from examples.lm.run import resolve
from examples.lm.train import Trainer
from tests.trainer import worker


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """A stand-in for cuDNN's kernel, which has first derivatives only; returns who was called."""
    plain, calls = jax.nn.dot_product_attention, []

    @jax.custom_vjp
    def fused(query, key, value):
        return plain(query, key, value, is_causal=True)

    def forward(query, key, value):
        calls.append("differentiated")
        return jax.vjp(lambda *args: plain(*args, is_causal=True), query, key, value)

    fused.defvjp(forward, lambda pullback, cotangent: pullback(cotangent))

    def attention(query, key, value, *, is_causal, implementation):
        assert is_causal
        calls.append(implementation)
        if implementation == "cudnn":
            return fused(query, key, value)
        return plain(query, key, value, is_causal=True)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    monkeypatch.setitem(MODELS, "micro", worker.MICRO)
    return calls


def run_with_the_kernel(optimizer):
    """What `resolve` would make of `--attention cudnn` on a GPU."""
    config = TrainConfig(model="micro", batch_size=4, optimizer=optimizer, warmup=0.0)
    run = resolve(config, devices=jax.devices()[:1])
    return dataclasses.replace(run, config=dataclasses.replace(config, attention="cudnn"))


BATCH = np.random.default_rng(0).integers(0, 256, (4, 17))


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("adamw", {"cudnn", "differentiated"}),
        ("sophia_g", {"cudnn", "differentiated"}),
        ("sophia_h", {"cudnn", "differentiated", "xla"}),
        ("contrib_sophia", {"cudnn", "differentiated", "xla"}),
    ],
)
def test_curvature_goes_around_the_kernel_only_where_it_takes_second_derivatives(
    optimizer, expected, kernels
):
    trainer = Trainer(run_with_the_kernel(optimizer))
    trainer.lower(trainer.abstract_sharded_state(), BATCH, None)
    assert set(kernels) == expected


@pytest.mark.parametrize(("optimizer", "said"), [("sophia_h", True), ("sophia_g", False)])
def test_the_detour_is_said(optimizer, said, capsys, tmp_path):
    run = run_with_the_kernel(optimizer)
    tokens = np.zeros(3, np.uint8)
    corpus = data.Corpus(tokens, tokens, tokens, 256)
    compare.describe(Console(width=200), run.config, {optimizer: run}, corpus, tmp_path)
    assert ("through XLA's attention" in capsys.readouterr().out) == said
