"""Our custom operations as ONNX operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..engines.engine import Form

# Importing these imports the kernels, which registers the operations.
from . import translate_folded
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


FOLDED = (translate_folded.quantized_linear, translate_folded.quantized_conv2d, translate_folded.int8_attention)
"""What stands in place of these in graphs of pairs of quantizers and dequantizers."""


def translations(form: Form) -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` takes as its custom translation table."""
    chosen = {function.__name__: function for function in (*TRANSLATED, *(FOLDED if form == "int8 folded" else ()))}
    return {getattr(torch.ops.diffpress, name).default: function for name, function in chosen.items()}
