"""How much arithmetic a token takes, and the share of the chips' peak that a run reaches (MFU)."""

import re

import jax

from .config import ModelConfig
from .model import parameter_count

# Dense bfloat16 FLOP/s of a device by its name in JAX, from Google Cloud's pages on each TPU
# version and NVIDIA's data sheets, without the doubling for sparse matrices.
PEAKS = {
    r"TPU v4": 275e12,
    r"TPU v5( lite|e)": 197e12,
    r"TPU v5p?": 459e12,
    r"TPU v6( lite|e)": 918e12,
    r"NVIDIA A100.*": 312e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA H100 80GB HBM3": 989e12,
    r"NVIDIA H200": 989e12,
}


def peak(device: jax.Device) -> float | None:
    """The device's peak, or None where it is not known."""
    known = (value for name, value in PEAKS.items() if re.fullmatch(name, device.device_kind))
    return next(known, None)


def per_token(model: ModelConfig) -> float:
    """What training takes for a token: 6 for each weight that multiplies it, and the attention.

    A forward pass multiplies and adds each weight once, a backward pass twice. The embedding counts
    as the output's matrix, positions are only added. Attention's two products take 2 L D a layer
    each, forward, for L positions of D features; they count in full although half of them are
    masked. What is recomputed does not count, nor does curvature (PaLM, arXiv 2204.02311,
    appendix B).
    """
    weights = parameter_count(model) - model.context * model.width
    return 6.0 * weights + 12.0 * model.layers * model.context * model.width


def utilization(
    model: ModelConfig, tokens_per_second: float, devices: list[jax.Device]
) -> float | None:
    """The share of the devices' peak that the model's own arithmetic takes."""
    of_one = peak(devices[0])
    if of_one is None:
        return None
    return tokens_per_second * per_token(model) / (of_one * len(devices))
