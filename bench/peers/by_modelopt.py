"""NVIDIA Model Optimizer's `mtq.quantize`, which computes in floats what its export would compute in integers.

Its diffusers example says what stays a float: first and last layers, time embeddings, shortcuts; embeddings by its defaults.
With activations: per-channel weights with the range of least squared error, per-tensor inputs with a percentile of the
recorded values, found by trying: plain extremes cost 5 to 8 dB at 4 bits and are about as good at 8. SmoothQuant and SVDQuant
with per-tensor inputs did no better. w4: AWQ in blocks of 32 input channels. Sizes are computed from the formats.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.calib import HistogramCalibrator
from task import FLOAT_BYTES, QuantizationResult, Record
from torch import Tensor, nn

BLOCK = 32
BITS: dict[str, tuple[int, int | None]] = {
    "W8A8": (8, 8),
    "W4A8": (4, 8),
    "W4A4": (4, 4),
    "W2A8": (2, 8),
    "w4": (4, None),
}
"""Of weights and of activations."""
PERCENTILES = {8: 99.99, 4: 99.5}
KEPT = (
    "time_emb_proj",
    "time_embedding",
    "conv_in",
    "conv_out",
    "conv_shortcut",
    "add_embedding",
    "pos_embed",
    "time_text_embed",
    "context_embedder",
    "norm_out",
    "x_embedder",
)

Entry = dict[str, Any]


class PercentileCalibrator(HistogramCalibrator):
    """The range that holds a share of all values."""

    def __init__(self, percentile: float, num_bits: int) -> None:
        super().__init__(num_bits, axis=None, unsigned=False)
        self._percentile = percentile

    def compute_amax(self) -> Tensor:
        return super().compute_amax("percentile", percentile=self._percentile)


def quantize(denoiser: nn.Module, bits: str, record: Record, work: Path) -> QuantizationResult:
    """Quantize the layers in place, and run them on the recorded inputs to find the ranges."""
    calls = record()

    @torch.no_grad()
    def forward(model: nn.Module) -> None:
        for inputs in calls:
            model(**inputs)

    mtq.quantize(denoiser, configuration(*BITS[bits]), forward)
    layers = list(quantized_layers(denoiser))
    size = sum(weight.numel() for weight in denoiser.parameters()) * FLOAT_BYTES
    return QuantizationResult(
        denoiser, size - sum(map(saved_bytes, layers)), sum(layer.weight.numel() for layer in layers), simulated=True
    )


def configuration(weights: int, activations: int | None) -> dict[str, Any]:
    """What `mtq.quantize` takes; later entries win."""
    entries = [off("*"), *weight_only(weights)] if activations is None else [off("*"), *static(weights, activations)]
    kept = [off("*", parent_class="nn.Embedding"), *(off(f"*{name}*") for name in KEPT)]
    return {"quant_cfg": entries + kept, "algorithm": "awq_lite" if activations is None else "mse"}


def static(weights: int, activations: int) -> list[Entry]:
    options = {"percentile": PERCENTILES[activations], "num_bits": activations}
    inputs = {"num_bits": activations, "axis": None, "calibrator": (PercentileCalibrator, (), options)}
    return [
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": weights, "axis": 0}},
        {"quantizer_name": "*input_quantizer", "cfg": inputs},
    ]


def weight_only(bits: int) -> list[Entry]:
    return [
        {"quantizer_name": "*weight_quantizer", "parent_class": parent, "cfg": {"num_bits": bits, "block_sizes": block}}
        for parent, block in (("nn.Linear", {-1: BLOCK}), ("nn.Conv2d", {1: BLOCK}))
    ]


def off(name: str, **where: str) -> Entry:
    return {"quantizer_name": name, **where, "enable": False}


def quantized_layers(denoiser: nn.Module) -> Iterator[Any]:
    for layer in denoiser.modules():
        quantizer = getattr(layer, "weight_quantizer", None)
        if quantizer is not None and quantizer.is_enabled:
            yield layer


def saved_bytes(layer: Any) -> int:
    """How much smaller the weights are than in half precision: codes, and a scale for each range."""
    numbers, quantizer = layer.weight.numel(), layer.weight_quantizer
    return numbers * FLOAT_BYTES - numbers * quantizer.num_bits // 8 - quantizer.amax.numel() * FLOAT_BYTES
