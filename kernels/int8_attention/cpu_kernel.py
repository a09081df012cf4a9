"""What computes `int8_attention` on a CPU: C++ in one call, or the reference where there is none."""

from __future__ import annotations

from torch import Tensor

from ..cpu import compute_attention, computes
from .reference import int8_attention_reference


def launch(q: Tensor, k: Tensor, v: Tensor, integer_values: bool = False) -> Tensor:
    """Compute `int8_attention`; its arguments are known to fit."""
    return (compute_attention if computes(q.dtype) else int8_attention_reference)(q, k, v, integer_values)
