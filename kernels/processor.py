"""What the processor at hand multiplies fast, asked anew at every call: nothing is decided at import."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
"""What oneDNN is asked of each type of 16 bits, among `torch.ops.mkldnn`."""


def uses_onednn() -> bool:
    """Whether torch was built with oneDNN and the user has not switched it off."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def why_no_byte_products() -> str | None:
    """Why `torch._int_mm` takes one product after the other on this CPU, or None where oneDNN computes it.

    The conditions are torch's own (its LinearAlgebra.cpp). A processor with AMX has AVX512-VNNI too.
    """
    if not uses_onednn():
        return "torch runs without oneDNN"
    return None if torch.cpu._is_vnni_supported() else "the processor lacks AVX512-VNNI"


def fast_dtype(x: Tensor) -> torch.dtype:
    """What products of `x` are best computed in: its dtype, or float32 for 16 bits that the CPU does not multiply.

    With AVX2 alone a linear layer of bfloat16 or float16 takes 7 times as long as one of float32, a convolution 80 times.
    """
    if x.device.type != "cpu" or x.dtype not in HALVES:
        return x.dtype
    return x.dtype if uses_onednn() and getattr(torch.ops.mkldnn, HALVES[x.dtype])() else torch.float32
