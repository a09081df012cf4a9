"""Triton kernels of `int8_attention`: codes of the tokens, then attention in one pass over the keys."""

from __future__ import annotations

from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Form
from ..launching import launch_kernel
from ..quantize_rows.reference import scales_for
from ..quantize_rows.triton_kernel import codes_of, largest_scale, round_half_even
from ..tiles import Tile, ceil_div
from .reference import LARGEST_CODE, tokens_before_heads

TILES = {64: Tile(128, 64, 64, 4, 3), 128: Tile(128, 64, 128, 8, 2)}
"""Queries and keys of a program, by the columns that the codes of a head are stored in; at 128 and 3 stages gfx942 spills."""
INTEGER_TILES = {64: Tile(64, 64, 64, 4, 3), 128: Tile(64, 64, 128, 8, 2)}
"""With integer values, whose products take registers of their own."""
LEAST_SCALE = tl.constexpr(2.0**-100)
"""Keeps scores that are left out at minus infinity, however small the scale that multiplies them."""
TOKENS, WARPS = 64, 4
"""Of a program that makes codes."""
ALIGNED = 16
"""Codes of values begin at multiples of so many bytes, which is what is loaded at once."""
TOP = tl.constexpr(LARGEST_CODE * 1.0)
LOG2_E = log2(e)
"""The kernel's exponentials are powers of two."""


@triton.jit
def quantize_tokens_kernel(
    x_pointer,
    mean_pointer,
    codes_pointer,
    scales_pointer,
    H,
    T,
    batch_stride,
    head_stride,
    token_stride,
    HAS_MEAN: tl.constexpr,
    FACTOR: tl.constexpr,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Codes [BT, BD] of one head, 0 beyond its D columns, and scales times FACTOR."""
    head = tl.program_id(1).to(tl.int64)
    t, d = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BD)
    inside = (t < T)[:, None] & (d < D)[None, :]
    x_pointer += head // H * batch_stride + head % H * head_stride
    value = tl.load(x_pointer + t.to(tl.int64)[:, None] * token_stride + d[None, :], mask=inside, other=0)
    value = value.to(tl.float32)
    if HAS_MEAN:
        mean = tl.load(mean_pointer + head * D + d, mask=d < D, other=0)
        value = tl.where(inside, value - mean[None, :], 0)
    scales = largest_scale(value, 127)
    codes = codes_of(value, scales[:, None], 0.0, -128, 127)
    tl.store(codes_pointer + (head * T + t)[:, None] * BD + d[None, :], codes, mask=(t < T)[:, None])
    tl.store(scales_pointer + head * T + t, tl.maximum(scales * FACTOR, LEAST_SCALE), mask=t < T)


@triton.jit
def quantize_values_kernel(
    v_pointer,
    scales_pointer,
    codes_pointer,
    H,
    S,
    width,
    batch_stride,
    head_stride,
    token_stride,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Codes [BD, width] of one head, with one scale a channel: tokens beside each other, as the sums over them want it."""
    head = tl.program_id(1).to(tl.int64)
    n, d = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BD)
    inside = (d < D)[:, None] & (n < S)[None, :]
    v_pointer += head // H * batch_stride + head % H * head_stride
    value = tl.load(v_pointer + n.to(tl.int64)[None, :] * token_stride + d[:, None], mask=inside, other=0)
    scales = tl.load(scales_pointer + head * D + d, mask=d < D, other=1)
    codes = codes_of(value.to(tl.float32), scales[:, None], 0.0, -128, 127)
    tl.store(codes_pointer + (head * BD + d)[:, None] * width + n[None, :], codes, mask=(n < width)[None, :])


@triton.jit
def int8_attention_kernel(
    q_pointer,
    k_pointer,
    v_pointer,
    q_scale_pointer,
    k_scale_pointer,
    v_scale_pointer,
    y_pointer,
    H,
    T,
    S,
    batch_stride,
    head_stride,
    token_stride,
    column_stride,
    INTEGER_VALUES: tl.constexpr,
    EVEN: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """BM queries of one head; strides are those of v, or of its codes with INTEGER_VALUES. EVEN: BN divides S.

    The softmax is taken as the keys come (Milakov and Gimelshein 2018, arXiv 1805.02867): probabilities are rounded over the
    largest so far, so never more coarsely than over the largest of all.
    """
    head = tl.program_id(1).to(tl.int64)
    m, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BD)
    m_mask = m < T
    q = tl.load(q_pointer + (head * T + m)[:, None] * BD + d[None, :], mask=m_mask[:, None], other=0)
    q_scale = tl.load(q_scale_pointer + head * T + m, mask=m_mask, other=1)
    k_pointers = k_pointer + head * S * BD + d[:, None]
    v_pointers = v_pointer + head // H * batch_stride + head % H * head_stride + d[None, :] * column_stride
    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, BD), tl.float32)
    for start in range(0, S, BN):
        n = start + tl.arange(0, BN)
        n_mask = n < S
        k = tl.load(k_pointers + n.to(tl.int64)[None, :] * BD, mask=n_mask[None, :], other=0)
        k_scale = tl.load(k_scale_pointer + head * S + n, mask=n_mask, other=0)
        scores = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32) * k_scale[None, :]
        if not EVEN:
            scores = tl.where(n_mask[None, :], scores, float("-inf"))
        # Scales are greater than 0, so the largest score stays the largest.
        above = tl.maximum(largest, tl.max(scores, 1) * q_scale)
        powers = tl.exp2(scores * q_scale[:, None] - above[:, None])
        shrunk = tl.exp2(largest - above)
        v_mask = n_mask[:, None] & (d < D)[None, :]
        v = tl.load(v_pointers + n.to(tl.int64)[:, None] * token_stride, mask=v_mask, other=0)
        if INTEGER_VALUES:
            powers = round_half_even(powers * TOP)
            products = tl.dot(powers.to(tl.int8), v, out_dtype=tl.int32)
            sums = sums * shrunk[:, None] + products.to(tl.float32)
        else:
            sums = tl.dot(powers.to(v.dtype), v, sums * shrunk[:, None], input_precision="ieee")
        total = total * shrunk + tl.sum(powers, 1)
        largest = above
    if INTEGER_VALUES:
        sums *= tl.load(v_scale_pointer + head * D + d, mask=d < D, other=0)[None, :]
    place = ((head // H * T + m) * H + head % H)[:, None] * D + d[None, :]
    y = (sums / total[:, None]).to(y_pointer.dtype.element_ty)
    tl.store(y_pointer + place, y, mask=m_mask[:, None] & (d < D)[None, :])


def launch(q: Tensor, k: Tensor, v: Tensor, integer_values: bool = False) -> Tensor:
    """Compute `int8_attention` on the device of its arguments, which are known to fit."""
    y = tokens_before_heads(q)
    batch, heads, tokens, columns = q.shape
    if y.numel() == 0:
        return y
    tile = tile_for(columns, integer_values)
    q_codes, q_scale = quantize_tokens(q, None, columns**-0.5 * LOG2_E, tile.depth)
    k_codes, k_scale = quantize_tokens(k, k.mean(2, dtype=torch.float32), 1.0, tile.depth)
    v_scale = q_scale
    v = _dense_columns(v)
    if integer_values:
        v, v_scale = quantize_values(v, tile.depth)
    launch_kernel(
        int8_attention_kernel,
        (ceil_div(tokens, tile.rows), batch * heads),
        q_codes,
        k_codes,
        v,
        q_scale,
        k_scale,
        v_scale,
        y,
        heads,
        tokens,
        k.shape[2],
        *v.stride(),
        INTEGER_VALUES=integer_values,
        EVEN=k.shape[2] % tile.columns == 0,
        D=columns,
        BM=tile.rows,
        BN=tile.columns,
        BD=tile.depth,
        warps=tile.warps,
        stages=tile.stages,
    )
    return y


def quantize_tokens(x: Tensor, mean: Tensor | None, factor: float, width: int) -> tuple[Tensor, Tensor]:
    """int8 codes [B, H, T, width] of `x` [B, H, T, D] less `mean` [B, H, D], and scales [B, H, T] times `factor`."""
    batch, heads, tokens, columns = x.shape
    codes = torch.empty(batch, heads, tokens, width, dtype=torch.int8, device=x.device)
    scales = torch.empty(batch, heads, tokens, dtype=torch.float32, device=x.device)
    x = _dense_columns(x)
    launch_kernel(
        quantize_tokens_kernel,
        (ceil_div(tokens, TOKENS), batch * heads),
        x,
        x if mean is None else mean,
        codes,
        scales,
        heads,
        tokens,
        *x.stride()[:3],
        HAS_MEAN=mean is not None,
        FACTOR=factor,
        D=columns,
        BT=TOKENS,
        BD=width,
        warps=WARPS,
    )
    return codes, scales


def quantize_values(v: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """int8 codes [B, H, S.., width] of `v` [B, H, S, D], whose tokens lie beside each other, and scales [B, H, D]."""
    batch, heads, tokens, columns = v.shape
    scales = scales_for(torch.linalg.vector_norm(v, torch.inf, 2, dtype=torch.float32), 8)
    length = ceil_div(tokens, ALIGNED) * ALIGNED
    codes = torch.empty(batch, heads, width, length, dtype=torch.int8, device=v.device)
    launch_kernel(
        quantize_values_kernel,
        (ceil_div(length, TOKENS), batch * heads),
        v,
        scales,
        codes,
        heads,
        tokens,
        length,
        *v.stride()[:3],
        D=columns,
        BT=TOKENS,
        BD=width,
        warps=WARPS,
    )
    return codes.transpose(2, 3), scales


def tile_for(columns: int, integer_values: bool) -> Tile:
    """The tile whose depth is the next that a head fits in."""
    tiles = INTEGER_TILES if integer_values else TILES
    return next(tile for depth, tile in tiles.items() if columns <= depth)


def _dense_columns(x: Tensor) -> Tensor:
    """Heads that are parts of one projection, as they mostly are, are read where they lie."""
    return x if x.stride(3) == 1 else x.contiguous()


def forms() -> list[Form]:
    """What is compiled ahead of time: all products of usual heads, other heads and ragged lengths, and the codes."""
    usual = [_form(64, True, False, "int8"), _form(64, True, False, "half"), _form(64, True, True, "int8")]
    sizes = ((40, False), (72, False), (128, True))
    others = [_form(columns, even, whole, "int8") for whole in (False, True) for columns, even in sizes]
    return [*usual, *others, *(make(columns) for make in (_tokens_form, _values_form) for columns in (64, 72))]


def _form(columns: int, even: bool, integer_values: bool, cores: str) -> Form:
    tile = tile_for(columns, integer_values)
    sizes = {"EVEN": even, "D": columns, "BM": tile.rows, "BN": tile.columns, "BD": tile.depth}
    # A stride of 1 is known when a kernel is compiled.
    constants = {**sizes, "INTEGER_VALUES": integer_values, "token_stride" if integer_values else "column_stride": 1}
    pointers = ("*i8", "*i8", "*i8" if integer_values else "*bf16", "*fp32", "*fp32", "*fp32", "*bf16")
    types = dict(zip(int8_attention_kernel.arg_names, (*pointers, *["i32"] * 7), strict=False))
    types = {name: kind for name, kind in types.items() if name not in constants}
    words = " integer values" if integer_values else ""
    name = f"heads of {columns} {'even' if even else 'ragged'}{words} {cores}"
    return Form(name, int8_attention_kernel, types, constants, tile.warps, tile.stages, cores)


def _tokens_form(columns: int) -> Form:
    constants = {"HAS_MEAN": True, "FACTOR": 1.0, **_codes_constants(columns)}
    pointers = ("*bf16", "*fp32", "*i8", "*fp32")
    types = dict(zip(quantize_tokens_kernel.arg_names, (*pointers, *["i32"] * 5), strict=False))
    return Form(f"codes of {columns}", quantize_tokens_kernel, types, constants, WARPS, 1, None)


def _values_form(columns: int) -> Form:
    types = dict(zip(quantize_values_kernel.arg_names, ("*bf16", "*fp32", "*i8", *["i32"] * 6), strict=False))
    constants = _codes_constants(columns)
    return Form(f"codes of values of {columns}", quantize_values_kernel, types, constants, WARPS, 1, None)


def _codes_constants(columns: int) -> dict[str, int]:
    return {"D": columns, "BT": TOKENS, "BD": tile_for(columns, True).depth}
