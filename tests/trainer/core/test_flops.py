"""How much arithmetic a token takes, and the share of the peak that a run reports."""

import dataclasses

import jax
import numpy as np
import pytest

from examples.lm import flops, loop
from examples.lm.config import MODELS, ModelConfig, TrainConfig
from examples.lm.data import Corpus
from examples.lm.run import resolve
from examples.lm.train import Trainer
from tests.trainer import worker


def test_a_token_takes_6_for_each_weight_and_what_attention_does():
    weights = 124_439_808 - 1024 * 768  # all but the positions
    assert flops.per_token(MODELS["gpt2-124m"]) == 6 * weights + 12 * 12 * 1024 * 768


def test_xla_counts_about_as_much_in_a_gradient(monkeypatch):
    model = ModelConfig(layers=2, width=64, heads=4, context=64, vocab_size=256)
    monkeypatch.setitem(MODELS, "micro", model)
    config = TrainConfig(model="micro", batch_size=8, optimizer="adamw")
    trainer = Trainer(resolve(config, devices=jax.devices()[:1]), unroll=True)
    params, batch = trainer.abstract_state.params, jax.ShapeDtypeStruct((8, 65), np.int32)
    counted = jax.jit(trainer.loss_and_gradient).lower(params, batch).cost_analysis()["flops"]
    assert counted / (8 * 64) == pytest.approx(flops.per_token(model), rel=0.15)


@dataclasses.dataclass
class Device:
    device_kind: str


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("TPU v4 lite", None),
        ("cpu", None),
    ],
)
def test_utilization_is_known_where_the_chips_peak_is(kind, peak):
    model, speed = MODELS["gpt2-124m"], 1e6
    share = flops.utilization(model, speed, [Device(kind)] * 4)
    assert share == (None if peak is None else speed * flops.per_token(model) / (4 * peak))


def test_utilization_is_logged_where_it_is_known(monkeypatch, tmp_path):
    monkeypatch.setitem(MODELS, "micro", worker.MICRO)
    monkeypatch.setattr(flops, "peak", lambda device: 1e12)
    text = np.arange(4096, dtype=np.uint16) % 256
    config = TrainConfig(model="micro", optimizer="adamw", steps=2, batch_size=8, eval_batches=1)
    with worker.quick_compilation(tmp_path):
        run = resolve(config, devices=jax.devices()[:1])
        result = loop.fit(run, Corpus(text, text, text, 256))
    line = result.records[1]
    expected = line["tokens_per_second"] * flops.per_token(worker.MICRO) / 1e12
    assert line["mfu"] == pytest.approx(expected)
