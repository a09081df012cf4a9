"""Packed weights written out for one product: where many rows share them it is far less work than to unpack every tile anew."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import Form
from .blocks import weight_tile
from .launching import launch_kernel
from .tiles import ceil_div

ROWS, COLUMNS = 16, 256
"""Of a weight, that one program writes out."""
MANY_ROWS = 64
"""Rows of x from which on it pays."""


@triton.jit
def spread_kernel(
    packed_pointer,
    scale_pointer,
    weight_pointer,
    N,
    K,
    row_stride,
    BITS: tl.constexpr,
    TAPS: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A weight [N, K] from packed codes; GROUP: times the scales of groups of columns; TAPS: [N, taps, C] from [N, C, taps]."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    start = tl.program_id(1) * BK
    k = start + tl.arange(0, BK)
    inside = (k < K)[:, None] & (n < N)[None, :]
    codes = weight_tile(packed_pointer, row_stride, n, start, n < N, K, BITS, False, BK)
    if GROUP:
        scales = scale_pointer + (n.to(tl.int64) * tl.cdiv(K, GROUP))[None, :] + (k // GROUP)[:, None]
        value = codes.to(tl.float32) * tl.load(scales, mask=inside, other=0)
    else:
        value = codes
    place = n.to(tl.int64)[None, :] * K + (k % TAPS * (K // TAPS) + k // TAPS)[:, None]
    tl.store(weight_pointer + place, value.to(weight_pointer.dtype.element_ty), mask=inside)


def spread_codes(weight: Tensor, depth: int, bits: int, taps: int = 1) -> Tensor:
    """int8 codes [N, depth]; of a convolution with the channels of each of its `taps` beside each other, as they are read."""
    if bits == 8 and taps in (1, depth):
        return weight.contiguous()
    return _spread(weight, None, depth, bits, taps, 0, torch.int8)


def spread_floats(
    weight: Tensor, weight_scale: Tensor, depth: int, bits: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The weight [N, depth] itself, dequantized in float32 and rounded to `dtype`."""
    return _spread(weight, weight_scale, depth, bits, 1, group_size, dtype)


def _spread(
    weight: Tensor, scale: Tensor | None, depth: int, bits: int, taps: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    spread = torch.empty(len(weight), depth, dtype=dtype, device=weight.device)
    launch_kernel(
        spread_kernel,
        (ceil_div(len(weight), ROWS), ceil_div(depth, COLUMNS)),
        weight.contiguous(),
        weight if scale is None else scale.contiguous(),
        spread,
        len(weight),
        depth,
        weight.shape[1],
        BITS=bits,
        TAPS=taps,
        GROUP=group_size,
        BN=ROWS,
        BK=COLUMNS,
    )
    return spread


def spread_form(bits: int, taps: int, group_size: int = 0) -> Form:
    """The kernel as it is launched for these."""
    constants = {"BITS": bits, "TAPS": taps, "GROUP": group_size, "BN": ROWS, "BK": COLUMNS}
    pointers = ("*i8" if bits == 8 else "*u8", "*fp32", "*bf16" if group_size else "*i8")
    types = dict(zip(spread_kernel.arg_names, (*pointers, *["i32"] * 3), strict=False))
    words = f"groups of {group_size}" if group_size else f"{taps} taps"
    return Form(f"spread W{bits} {words}", spread_kernel, types, constants, 4, 1, None)
