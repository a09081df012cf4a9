"""Our custom operations as ONNX operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Importing these imports the kernels, which registers the operations.
from .translate_attention import int8_attention
from .translate_floats import fp8_conv2d, fp8_linear, weight_only_conv2d, weight_only_linear
from .translate_integers import quantized_conv2d, quantized_linear

TRANSLATED = (
    quantized_linear,
    quantized_conv2d,
    weight_only_linear,
    weight_only_conv2d,
    fp8_linear,
    fp8_conv2d,
    int8_attention,
)
"""Each has the name and the arguments of the operation it stands for."""


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` takes as its custom translation table."""
    return {getattr(torch.ops.diffpress, function.__name__).default: function for function in TRANSLATED}
