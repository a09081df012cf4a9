"""The exact integer product under every quantized operation."""

from __future__ import annotations

import torch
from torch import Tensor


def integer_matmul(left: Tensor, right: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """int8 [M, K], less `zero_point` (int32 [1]), times int8 [N, K] transposed, summed in int32: [M, N].

    cuBLASLt wants more than 16 rows and multiples of 8, and on the CPU torch 2.13 gives noise where K is 1; there float64
    is exact, since |sum| <= K * 2**14 < 2**53.
    """
    rows, depth = left.shape
    aligned = rows > 16 and depth % 8 == 0 and len(right) % 8 == 0
    supported = depth > 1 if left.device.type == "cpu" else aligned
    product = torch._int_mm(left, right.t()) if supported else (left.double() @ right.double().t()).to(torch.int32)
    return product if zero_point is None else product.sub_(zero_point * right.sum(1, dtype=torch.int32))
