"""From floats to codes, with one scale given for all rows or found for each."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..fused_checks import check_quantize_rows
from ..library import define_op
from .reference import quantize_rows_reference

__all__ = ["quantize_rows"]


def quantize_rows(
    x: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None, bits: int = 8
) -> tuple[Tensor, Tensor]:
    """int8 codes of floating point `x` [..., K], and the scales that they are to be multiplied with.

    `scale` is float32 [1] and comes back as it is, `zero_point` [1], the code of 0, an int32 within the codes. Without a
    `scale` each row gets one that puts its largest magnitude at the largest code: float32 [rows], 1 where all is 0. Raises
    ValueError naming what does not fit.
    """
    check_quantize_rows(x, scale, zero_point, bits)
    return torch.ops.diffpress.quantize_rows(x, scale, zero_point, bits)


def _fake(x: Tensor, scale: Tensor | None, _zero_point: Tensor | None, _bits: int) -> tuple[Tensor, Tensor]:
    rows = prod(x.shape[:-1]) if scale is None else 1
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)


define_op(__name__, quantize_rows_reference, _fake)
