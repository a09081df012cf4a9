"""torchao's `quantize_`, which calibrates nothing.

W8A8, W4A8 and W2A8 quantize Linear layers and, dynamically for each token, what enters them: the only layers torchao offers
this for. w4 takes the convolutions as well. Low bits are asymmetric in groups of 32 input channels, or 16 where 32 does not
divide; a layer that 16 does not divide stays as it is. Symmetric groups and the HQQ search did no better.
torchao computes low bits in floats on this kind of processor and holds them in bytes: their size is what packing them takes.
torchao asks to be compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from task import FLOAT_BYTES, QuantizationResult, Record
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    quantize_,
)

GROUPS = (32, 16)
LINEAR, WITH_CONVOLUTIONS = (nn.Linear,), (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Scheme:
    """How one row is made."""

    bits: int
    config: Callable[[int], AOBaseConfig]
    """For the number of input channels that share a scale."""
    groups: tuple[int, ...] = GROUPS
    """Tried in this order; the input channels must be divisible."""
    layers: tuple[type[nn.Module], ...] = LINEAR


def dynamic(dtype: torch.dtype) -> Callable[[int], AOBaseConfig]:
    return lambda group: Int8DynamicActivationIntxWeightConfig(
        weight_dtype=dtype, weight_granularity=PerGroup(group), weight_mapping_type=MappingType.ASYMMETRIC
    )


def weight_only(group: int) -> AOBaseConfig:
    return IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=PerGroup(group), mapping_type=MappingType.ASYMMETRIC
    )


SCHEMES = {
    "W8A8": Scheme(8, lambda _: Int8DynamicActivationInt8WeightConfig(), groups=(1,)),
    "W4A8": Scheme(4, dynamic(torch.int4)),
    "W2A8": Scheme(2, dynamic(torch.int2)),
    "w4": Scheme(4, weight_only, layers=WITH_CONVOLUTIONS),
}


def quantize(denoiser: nn.Module, bits: str, record: Record, work: Path) -> QuantizationResult:
    """Quantize the layers in place."""
    scheme = SCHEMES[bits]
    for group in scheme.groups:
        quantize_(denoiser, scheme.config(group), filter_fn=lambda layer, _, group=group: fits(layer, scheme, group))
    weights = list(denoiser.parameters())
    numbers = sum(weight.numel() for weight in weights if is_quantized(weight))
    size = sum(stored_bytes(weight, scheme.bits) for weight in weights)
    return QuantizationResult(denoiser, size, numbers, simulated=scheme.bits < 8, compiled=True)


def fits(layer: nn.Module, scheme: Scheme, group: int) -> bool:
    """Whether a layer is still to be quantized, and can be with this group size."""
    return isinstance(layer, scheme.layers) and not is_quantized(layer.weight) and layer.weight.shape[1] % group == 0


def is_quantized(weight: Any) -> bool:
    return hasattr(weight, "qdata")


def stored_bytes(weight: Any, bits: int) -> int:
    """Bytes of a parameter: its numbers and zero points in `bits`, all else in half precision."""
    if not is_quantized(weight):
        return weight.numel() * FLOAT_BYTES
    integers = weight.qdata.numel() + weight.zero_point.numel()
    return integers * bits // 8 + weight.scale.numel() * FLOAT_BYTES
