"""Triton kernel of `block_sparse_linear`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Form
from ..blocks import tile_of
from ..launching import given, launch_kernel
from ..tiles import Tile, ceil_div

FEW_ROWS = 16
"""Of the smallest tile."""


@triton.jit
def block_sparse_linear_kernel(
    x_pointer,
    values_pointer,
    column_index_pointer,
    row_pointer_pointer,
    weight_scale_pointer,
    activation_scale_pointer,
    bias_pointer,
    y_pointer,
    M,
    N,
    K,
    SCALED: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One [BM, BLOCK] tile of the output, from the blocks that one row of blocks has; SCALED: they are int8."""
    row, column = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BLOCK))
    inner = tl.arange(0, BLOCK)
    m, n = row * BM + tl.arange(0, BM), column * BLOCK + inner
    m_mask, n_mask = m < M, n < N
    sums = tl.zeros((BM, BLOCK), tl.int32 if SCALED else tl.float32)
    x_pointers = x_pointer + m.to(tl.int64)[:, None] * K
    first, last = tl.load(row_pointer_pointer + column), tl.load(row_pointer_pointer + column + 1)
    # A block lies [N, K]; it is read as [K, N].
    block_pointers = values_pointer + first.to(tl.int64) * BLOCK * BLOCK + inner[None, :] * BLOCK + inner[:, None]
    for i in range(first, last):
        k = tl.load(column_index_pointer + i) * BLOCK + inner
        x_mask = m_mask[:, None] if EVEN else m_mask[:, None] & (k < K)[None, :]
        x = tl.load(x_pointers + k[None, :], mask=x_mask, other=0)
        block = tl.load(block_pointers)
        block_pointers += BLOCK * BLOCK
        # Without "ieee" float32 would be cut to TensorFloat-32; smaller types do not mind.
        sums = tl.dot(x, block, sums, input_precision="ieee", out_dtype=sums.dtype)
    value = sums.to(tl.float32)
    if SCALED:
        if ROW_SCALES:
            scale = tl.load(activation_scale_pointer + m, mask=m_mask, other=0)[:, None]
        else:
            scale = tl.load(activation_scale_pointer)
        value *= scale * tl.load(weight_scale_pointer + n, mask=n_mask, other=0)[None, :]
    if HAS_BIAS:
        value += tl.load(bias_pointer + n, mask=n_mask, other=0).to(tl.float32)[None, :]
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_pointer + place, value.to(y_pointer.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])


def launch(
    x: Tensor,
    values: Tensor,
    column_index: Tensor,
    row_pointer: Tensor,
    weight_scale: Tensor | None,
    activation_scale: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    dtype: torch.dtype,
) -> Tensor:
    """Compute `block_sparse_linear` on the device of its arguments, which are known to fit."""
    rows, depth, block = x.shape[:-1].numel(), x.shape[-1], values.shape[1]
    y = torch.empty(*x.shape[:-1], outputs, dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    tile = next(tile for tile in tiles_for(block, x.dtype) if tile.rows <= max(rows, FEW_ROWS))
    launch_kernel(
        block_sparse_linear_kernel,
        (ceil_div(rows, tile.rows) * (len(row_pointer) - 1),),
        x.contiguous(),
        values.contiguous(),
        column_index.contiguous(),
        row_pointer.contiguous(),
        given(weight_scale, x),
        given(activation_scale, x),
        given(bias, x),
        y,
        rows,
        outputs,
        depth,
        SCALED=weight_scale is not None,
        ROW_SCALES=activation_scale is not None and activation_scale.numel() > 1,
        HAS_BIAS=bias is not None,
        EVEN=depth % block == 0,
        BM=tile.rows,
        BLOCK=block,
        warps=tile.warps,
        stages=tile.stages,
    )
    return y


def tiles_for(block: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """For many rows and for few; float32, which no tensor core takes, fills the registers sooner."""
    if dtype == torch.float32:
        return (Tile(FEW_ROWS, block, block, 8, 2),)
    return Tile(128, block, block, block // 8, 3), Tile(FEW_ROWS, block, block, 4, 4)


def forms() -> list[Form]:
    """What is compiled ahead of time: every tile of both sizes of blocks."""
    kinds = (("i8", torch.int8), ("bf16", torch.bfloat16), ("fp32", torch.float32))
    return [_form(tile, word) for word, dtype in kinds for block in (64, 32) for tile in tiles_for(block, dtype)]


def _form(tile: Tile, word: str) -> Form:
    kind = f"*{word}"
    types = (kind, kind, "*i32", "*i32", "*fp32", "*fp32", "*bf16", "*bf16", "i32", "i32", "i32")
    constants = {
        "SCALED": word == "i8",
        "ROW_SCALES": False,
        "HAS_BIAS": True,
        "EVEN": True,
        "BM": tile.rows,
        "BLOCK": tile.depth,
    }
    named = dict(zip(block_sparse_linear_kernel.arg_names, types, strict=False))
    cores = {"i8": "int8", "bf16": "half"}.get(word)
    name = f"{word} {tile.rows}x{tile.columns}"
    return Form(name, block_sparse_linear_kernel, named, constants, tile.warps, tile.stages, cores)
