"""The exact integer product under every quantized operation: the one place that decides what computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from .processor import why_no_byte_products

EXACT_COLUMNS = 1024
"""Products of two codes that add up exactly in float32: 1024 times -128 * -128 is 2**24, up to which it holds every integer.

No sum of some of them is larger, so neither their order nor fused additions matter. Nor do bfloat16 and TF32 inside, which
users may allow for products of float32: both hold every code.
"""


def integer_matmul(left: Tensor, right: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """int8 [M, K], less `zero_point` (int32 [1]), times int8 [N, K] transposed, summed in int32: [M, N]."""
    product = (byte_products if multiplies_bytes(left, right) else float_products)(left, right)
    return product if zero_point is None else product.sub_(zero_point * right.sum(1, dtype=torch.int32))


def multiplies_bytes(left: Tensor, right: Tensor) -> bool:
    """Whether `byte_products` is fast and right for int8 [M, K] and [N, K] where they are.

    cuBLASLt wants more than 16 rows and multiples of 8. On the CPU torch 2.13 gives noise where K is 1.
    """
    rows, depth = left.shape
    if left.device.type == "cuda":
        return rows > 16 and depth % 8 == 0 and len(right) % 8 == 0
    return left.device.type == "cpu" and depth > 1 and why_no_byte_products() is None


def byte_products(left: Tensor, right: Tensor) -> Tensor:
    """int8 [M, K] times int8 [N, K] transposed by the processor's products of bytes: int32 [M, N]."""
    return torch._int_mm(left, right.t())


def float_products(left: Tensor, right: Tensor) -> Tensor:
    """The same, to the bit, by float32 products of as many columns at a time as add up exactly."""
    first, *rest = (
        (a.float() @ b.float().t()).to(torch.int32)
        for a, b in zip(left.split(EXACT_COLUMNS, 1), right.split(EXACT_COLUMNS, 1), strict=True)
    )
    for part in rest:
        first += part
    return first
