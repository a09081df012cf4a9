"""Triton kernel of `quantize_rows`, and the rounding that every kernel shares which makes codes."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Form
from ..launching import given, launch_kernel
from ..quantization import code_range
from ..tiles import ceil_div

BLOCK = 2048
"""Numbers that one program rounds where all have one scale."""


class RowTile(NamedTuple):
    """Rows and columns that one program keeps in its registers, and its warps."""

    rows: int
    columns: int
    warps: int


@triton.jit
def round_half_even(x):
    """Float32 `x`, below 2**22 in size, to whole numbers: beside 1.5 * 2**23 there is no room for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def codes_of(value, scale, zero_point, LOW: tl.constexpr, HIGH: tl.constexpr):
    """int8 codes of float32 `value` as `quantize` makes them; the ends between which it is rounded lie beyond all codes."""
    moved = round_half_even(tl.clamp(tl.div_rn(value, scale), -65536.0, 65536.0)) + zero_point
    return tl.clamp(moved, LOW, HIGH).to(tl.int8)


@triton.jit
def largest_scale(value, HIGH: tl.constexpr):
    """The scale of each row of float32 `value` [BM, BK] that puts its largest magnitude at the code HIGH; 1 for zeros."""
    scale = tl.div_rn(tl.max(tl.abs(value), 1), HIGH * 1.0)
    return tl.where(scale > 0, scale, 1.0)


@triton.jit
def store_codes(
    value,
    m,
    place,
    m_mask,
    inside,
    scale_pointer,
    zero_point_pointer,
    codes_pointer,
    scales_pointer,
    STATIC: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    """Quantise float32 rows `m` [BM, BK], which are 0 outside, and store their codes and their scales."""
    zero_point = tl.load(zero_point_pointer).to(tl.float32) if HAS_ZERO else 0.0
    if STATIC:
        scale = tl.load(scale_pointer)
        tl.store(scales_pointer, scale, mask=tl.program_id(0) + tl.program_id(1) == 0)
        codes = codes_of(value, scale, zero_point, LOW, HIGH)
    else:
        scales = largest_scale(value, HIGH)
        tl.store(scales_pointer + m, scales, mask=m_mask)
        codes = codes_of(value, scales[:, None], zero_point, LOW, HIGH)
    tl.store(codes_pointer + place, codes, mask=inside)


@triton.jit
def quantize_kernel(
    x_pointer,
    scale_pointer,
    zero_point_pointer,
    codes_pointer,
    N,
    HAS_ZERO: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK of N codes, all of one scale."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < N
    value = tl.load(x_pointer + place, mask=inside, other=0).to(tl.float32)
    zero_point = tl.load(zero_point_pointer).to(tl.float32) if HAS_ZERO else 0.0
    tl.store(codes_pointer + place, codes_of(value, tl.load(scale_pointer), zero_point, LOW, HIGH), mask=inside)


@triton.jit
def quantize_rows_kernel(
    x_pointer,
    codes_pointer,
    scales_pointer,
    M,
    K,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Codes of BM rows, which lie in a tile, and a scale for each."""
    m, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BK)
    m_mask = m < M
    inside = m_mask[:, None] & (k < K)[None, :]
    place = m.to(tl.int64)[:, None] * K + k[None, :]
    value = tl.load(x_pointer + place, mask=inside, other=0).to(tl.float32)
    store_codes(
        value, m, place, m_mask, inside, scales_pointer, scales_pointer, codes_pointer, scales_pointer,
        False, False, LOW, HIGH,
    )  # fmt: skip


def launch(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """Compute `quantize_rows` on the device of its arguments, which are known to fit."""
    return _by_rows(x, bits) if scale is None else (quantize_all(x, scale, zero_point, bits), scale.clone())


def quantize_all(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """int8 codes of `x` [...], all with the `scale` [1]."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    number = codes.numel()
    if number == 0:
        return codes
    low, high = code_range(bits)
    launch_kernel(
        quantize_kernel,
        (ceil_div(number, BLOCK),),
        x.contiguous(),
        scale.contiguous(),
        given(zero_point, codes),
        codes,
        number,
        HAS_ZERO=zero_point is not None,
        LOW=low,
        HIGH=high,
        BLOCK=BLOCK,
    )
    return codes


def _by_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if codes.numel() == 0:
        return codes, torch.ones(rows, dtype=torch.float32, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    low, high = code_range(bits)
    tile = row_tile(columns)
    launch_kernel(
        quantize_rows_kernel,
        (ceil_div(rows, tile.rows),),
        x.contiguous(),
        codes,
        scales,
        rows,
        columns,
        LOW=low,
        HIGH=high,
        BM=tile.rows,
        BK=tile.columns,
        warps=tile.warps,
    )
    return codes, scales


@cache
def row_tile(columns: int) -> RowTile:
    """The tile for rows that must lie in one: 16 to 32 numbers a thread where the rows are long enough."""
    width = max(16, triton.next_power_of_2(columns))
    rows = max(1, 2048 // width)
    return RowTile(rows, width, min(16, max(4, rows * width // 1024)))


def forms() -> list[Form]:
    """What is compiled ahead of time: one scale, and one a row of short, usual and the longest rows."""
    return [_one_scale(), *map(_row_scales, (320, 3072, 16384))]


def _one_scale() -> Form:
    types = dict(zip(quantize_kernel.arg_names, ("*bf16", "*fp32", "*i32", "*i8", "i32"), strict=False))
    constants = {"HAS_ZERO": True, "LOW": -128, "HIGH": 127, "BLOCK": BLOCK}
    return Form(f"one scale {BLOCK}", quantize_kernel, types, constants, 4, 1, None)


def _row_scales(columns: int) -> Form:
    tile = row_tile(columns)
    types = dict(zip(quantize_rows_kernel.arg_names, ("*bf16", "*i8", "*fp32", "i32", "i32"), strict=False))
    constants = {"LOW": -128, "HIGH": 127, "BM": tile.rows, "BK": tile.columns}
    return Form(f"scale a row {tile.rows}x{tile.columns}", quantize_rows_kernel, types, constants, tile.warps, 1, None)
