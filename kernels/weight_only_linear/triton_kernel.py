"""Triton kernel of `weight_only_linear`, and of `lora_linear`, which has a low-rank branch beside the same weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Form
from ..blocks import tile_of, weight_tile
from ..launching import given, launch_kernel
from ..spreading import MANY_ROWS, spread_floats, spread_form
from ..tiles import AT_ONCE, Tile, ceil_div, pick, tile_depth

TILES = (Tile(64, 64, 64, 4, 4), Tile(16, 64, 128, 4, 4))
"""For all the rows that there may be here, and for few (see MANY_ROWS)."""
SMALLER_TILES = (Tile(64, 64, 64, 4, 3), Tile(16, 64, 64, 4, 4))
"""Where every column of a tile has a scale of its own, or a low-rank branch is added: larger tiles do not fit the registers."""
SMALLEST_RANK = 16
"""What tensor cores take."""
LOW_RANK = 32
"""The highest rank that SMALLER_TILES have room for."""
HIGH_RANK_TILES = (Tile(64, 64, 32, 8, 3), Tile(16, 64, 32, 4, 3))
FLOAT32_TILES = (Tile(64, 32, 16, 4, 3), Tile(16, 32, 32, 4, 3))
"""No tensor cores, so that operands fill the registers as well."""
FLOAT32_BRANCH_TILES = (Tile(16, 32, 16, 8, 3),)
SHORTEST = 256
"""Columns of the weight that one program sums at least where several share an output."""
BLOCK = 1024
"""Outputs of one program that adds up what others summed."""


class Branch(NamedTuple):
    """x A^T B^T s: matrices [R, K] and [N, R] in the dtype of x, and their scale."""

    down: Tensor
    up: Tensor
    scale: float


@triton.jit
def float_weights(
    pointer,
    scale_pointer,
    row_stride,
    n,
    start,
    n_mask,
    K,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    BK: tl.constexpr,
):
    """The tile [BK, BN] that `weight_tile` gives as codes, dequantized in float32 and rounded to DTYPE."""
    codes = weight_tile(pointer, row_stride, n, start, n_mask, K, BITS, EVEN, BK).to(tl.float32)
    scales = scale_pointer + n.to(tl.int64) * tl.cdiv(K, GROUP)
    if GROUP % BK == 0:
        scale = tl.load(scales + start // GROUP, mask=n_mask, other=0)[None, :]
    else:
        # The tile reaches over several groups: every column asks for its own.
        k = start + tl.arange(0, BK)
        scale = tl.load(scales[None, :] + (k // GROUP)[:, None], mask=n_mask[None, :] & (k < K)[:, None], other=0)
    return (codes * scale).to(DTYPE)


@triton.jit
def weight_only_linear_kernel(
    x_pointer,
    weight_pointer,
    weight_scale_pointer,
    bias_pointer,
    down_pointer,
    up_pointer,
    y_pointer,
    M,
    N,
    K,
    weight_stride,
    span,
    rank,
    branch_scale,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One [BM, BN] tile of the output, of the columns `span` * part on of the weight; RANK: the power of two over `rank`."""
    row, column = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN))
    part = tl.program_id(1)
    m, n, r = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN), tl.arange(0, RANK if RANK else 1)
    m_mask, n_mask, r_mask = m < M, n < N, r < rank
    sums = tl.zeros((BM, BN), tl.float32)
    low = tl.zeros((BM, RANK if RANK else 1), tl.float32)
    x_pointers = x_pointer + m.to(tl.int64)[:, None] * K
    down_pointers = down_pointer + r.to(tl.int64)[None, :] * K
    for start in range(part * span, min((part + 1) * span, K), BK):
        k = start + tl.arange(0, BK)
        x_mask = m_mask[:, None] if EVEN else m_mask[:, None] & (k < K)[None, :]
        x = tl.load(x_pointers + k[None, :], mask=x_mask, other=0)
        weight = float_weights(
            weight_pointer, weight_scale_pointer, weight_stride, n, start, n_mask, K, x.dtype, BITS, GROUP, EVEN, BK
        )
        # Without "ieee" float32 would be cut to TensorFloat-32; smaller types do not mind.
        sums = tl.dot(x, weight, sums, input_precision="ieee")
        if RANK:
            down_mask = r_mask[None, :] if EVEN else r_mask[None, :] & (k < K)[:, None]
            down = tl.load(down_pointers + k[:, None], mask=down_mask, other=0)
            low = tl.dot(x, down, low, input_precision="ieee")
    if RANK:
        up_pointers = up_pointer + n.to(tl.int64)[None, :] * rank + r[:, None]
        up = tl.load(up_pointers, mask=n_mask[None, :] & r_mask[:, None], other=0)
        sums = tl.dot((low * branch_scale).to(up.dtype), up, sums, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias_pointer + n, mask=n_mask, other=0).to(tl.float32)[None, :]
    place = (part.to(tl.int64) * M + m)[:, None] * N + n[None, :]
    tl.store(y_pointer + place, sums.to(y_pointer.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])


@triton.jit
def sum_parts_kernel(
    parts_pointer, bias_pointer, y_pointer, parts, size, N, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of `parts` times `size` float32 values, always in the same order, and the bias of the N columns."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    sums = tl.zeros((BLOCK,), tl.float32)
    pointers = parts_pointer + place
    for _ in range(parts):
        sums += tl.load(pointers, mask=mask, other=0)
        pointers += size
    if HAS_BIAS:
        sums += tl.load(bias_pointer + place % N, mask=mask, other=0).to(tl.float32)
    tl.store(y_pointer + place, sums.to(y_pointer.dtype.element_ty), mask=mask)


def launch(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, weight_bits: int, group_size: int
) -> Tensor:
    """Compute `weight_only_linear` on the device of its arguments, which are known to fit."""
    return launch_beside(None, x, weight, weight_scale, bias, weight_bits, group_size)


def launch_beside(
    branch: Branch | None,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    group_size: int,
) -> Tensor:
    """The same, with a low-rank branch; of few rows in the same pass, where several programs share each of few tiles."""
    rows, depth, columns = x.shape[:-1].numel(), x.shape[-1], len(weight)
    if rows >= MANY_ROWS:
        return _multiply(branch, x, spread_floats(weight, weight_scale, depth, weight_bits, group_size, x.dtype), bias)
    y = torch.empty(*x.shape[:-1], columns, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rank = 0 if branch is None else len(branch.down)
    tile = pick(tiles_for(x.dtype, group_size, rank), rows, columns)
    deep = tile_depth(tile, group_size) or tile.depth
    tiles = tile.programs(rows, columns)
    span = columns_of_a_part(tiles, depth, deep)
    parts = max(1, ceil_div(depth, span))
    sums = y if parts == 1 else torch.empty(parts, rows, columns, device=x.device)
    bias = None if bias is None else bias.to(x.dtype)
    launch_kernel(
        weight_only_linear_kernel,
        (tiles, parts),
        x.contiguous(),
        weight.contiguous(),
        weight_scale.contiguous(),
        given(bias, x),
        given(branch and branch.down, x),
        given(branch and branch.up, x),
        sums,
        rows,
        columns,
        depth,
        weight.shape[1],
        span,
        rank,
        branch.scale if branch else 0.0,
        BITS=weight_bits,
        GROUP=group_size,
        RANK=padded(rank),
        HAS_BIAS=bias is not None and parts == 1,
        EVEN=depth % deep == 0,
        BM=tile.rows,
        BN=tile.columns,
        BK=deep,
        warps=tile.warps,
        stages=tile.stages,
    )
    if parts > 1:
        launch_kernel(
            sum_parts_kernel,
            (ceil_div(y.numel(), BLOCK),),
            sums,
            given(bias, x),
            y,
            parts,
            y.numel(),
            columns,
            HAS_BIAS=bias is not None,
            BLOCK=BLOCK,
        )
    return y


def _multiply(branch: Branch | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # In the dtype of x, whatever autocast makes of products.
    with torch.autocast(x.device.type, enabled=False):
        y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        if branch is None:
            return y
        low = F.linear(x, branch.down) * branch.scale
        return torch.addmm(y.view(-1, len(weight)), low.view(-1, len(branch.down)), branch.up.t()).view(y.shape)


def tiles_for(dtype: torch.dtype, group_size: int, rank: int) -> tuple[Tile, ...]:
    """The tiles that fit the registers."""
    if dtype == torch.float32:
        return FLOAT32_BRANCH_TILES if rank else FLOAT32_TILES
    if rank > LOW_RANK:
        return HIGH_RANK_TILES
    return SMALLER_TILES if rank or not tile_depth(TILES[0], group_size) else TILES


def columns_of_a_part(tiles: int, depth: int, deep: int) -> int:
    """How many columns of the weight each program sums, a multiple of `deep`, so that all multiprocessors have work."""
    parts = max(1, min(AT_ONCE // tiles, depth // SHORTEST))
    return max(1, ceil_div(depth, parts * deep)) * deep


def padded(rank: int) -> int:
    """The rank that the kernel computes with: a power of two that tensor cores take, or 0 where there is no branch."""
    return max(SMALLEST_RANK, triton.next_power_of_2(rank)) if rank else 0


def forms() -> list[Form]:
    """What is compiled ahead of time: every tile at 4 bits, and other formats in the largest that they take."""
    formats = [(tile, 4, 128, "bf16") for tile in TILES]
    formats += [(TILES[0], bits, group_size, "fp16") for bits, group_size in ((8, 1152), (3, 64), (2, 32))]
    formats += [(tile, 4, 100, "bf16") for tile in SMALLER_TILES] + [(tile, 4, 128, "fp32") for tile in FLOAT32_TILES]
    spreads = [spread_form(bits, 1, group_size) for bits, group_size in ((4, 64), (8, 1152), (3, 100))]
    return [*(form(*chosen) for chosen in formats), *spreads, _sum_form()]


def form(tile: Tile, bits: int, group_size: int, dtype: str, rank: int = 0) -> Form:
    """The kernel as it is launched for these."""
    packed, own = "*i8" if bits == 8 else "*u8", f"*{dtype}"
    constants = {
        "BITS": bits,
        "GROUP": group_size,
        "RANK": padded(rank),
        "HAS_BIAS": True,
        "EVEN": True,
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile_depth(tile, group_size) or tile.depth,
    }
    types = (own, packed, "*fp32", own, own, own, own, *["i32"] * 6, "fp32")
    name = f"W{bits} groups of {group_size} {dtype} {f'rank {rank} ' if rank else ''}{tile.rows}x{tile.columns}"
    named = dict(zip(weight_only_linear_kernel.arg_names, types, strict=False))
    cores = None if dtype == "fp32" else "half"
    return Form(name, weight_only_linear_kernel, named, constants, tile.warps, tile.stages, cores)


def _sum_form() -> Form:
    types = dict(zip(sum_parts_kernel.arg_names, ("*fp32", "*bf16", "*bf16", "i32", "i32", "i32"), strict=False))
    return Form("sum of parts", sum_parts_kernel, types, {"HAS_BIAS": True, "BLOCK": BLOCK}, 4, 3, None)
