"""Triton kernel of `fp8_linear`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Form
from ..blocks import tile_of
from ..launching import given, launch_kernel
from ..quantization import FP8_MAX
from ..quantize_rows.triton_kernel import row_tile
from ..tiles import Tile, ceil_div, is_hopper, pick
from .reference import fp8_linear_reference

TILES = (Tile(128, 128, 64, 8, 3), Tile(64, 64, 128, 4, 3))
"""For large outputs and for small ones; with less than 64 rows H100 and B200 multiply in half precision instead."""
ROWS, ALIGNED = 16, 16
"""torch's product takes more rows than so many, and sides of the weight that are multiples of this."""
TARGETS = ("sm_89", "sm_90", "sm_100", "sm_120")
"""What multiplies float8 of this kind; MI300's has another bias in its exponent."""

WIDEST = 4096
"""Columns of a tile that is made float8."""
LARGEST = tl.constexpr(FP8_MAX)


@triton.jit
def round_to_fp8(x):
    """Float32 `x`, no larger than LARGEST, half to even to what float8_e4m3fn holds: no cast is left to round."""
    bits = x.to(tl.int32, bitcast=True)
    # Three bits of the fraction stay; below 2**-6 steps are 2**-9, which beside 1.5 * 2**14 are the last that fit.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, normal)


@triton.jit
def fp8_rows_kernel(
    x_pointer, scale_pointer, y_pointer, M, K, ROW_SCALES: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):
    """One [BM, BK] tile of `to_fp8`."""
    m, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BK + tl.arange(0, BK)
    m_mask = m < M
    inside = m_mask[:, None] & (k < K)[None, :]
    place = m.to(tl.int64)[:, None] * K + k[None, :]
    value = tl.load(x_pointer + place, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scale_pointer + m, mask=m_mask, other=1)[:, None] if ROW_SCALES else tl.load(scale_pointer)
    value = round_to_fp8(tl.clamp(tl.div_rn(value, scale), -LARGEST, LARGEST, tl.PropagateNan.ALL))
    tl.store(y_pointer + place, value.to(y_pointer.dtype.element_ty), mask=inside)


@triton.jit
def fp8_linear_kernel(
    x_pointer,
    weight_pointer,
    weight_scale_pointer,
    activation_scale_pointer,
    bias_pointer,
    y_pointer,
    M,
    N,
    K,
    ROW_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One [BM, BN] tile of the output."""
    row, column = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN))
    m, n = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    m_mask, n_mask = m < M, n < N
    sums = tl.zeros((BM, BN), tl.float32)
    x_pointers = x_pointer + m.to(tl.int64)[:, None] * K
    weight_pointers = weight_pointer + n.to(tl.int64)[None, :] * K
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x_mask = m_mask[:, None] if EVEN else m_mask[:, None] & (k < K)[None, :]
        weight_mask = n_mask[None, :] if EVEN else n_mask[None, :] & (k < K)[:, None]
        x = tl.load(x_pointers + k[None, :], mask=x_mask, other=0.0)
        weight = tl.load(weight_pointers + k[:, None], mask=weight_mask, other=0.0)
        # H100 adds products of float8 up in 14 bits: after every tile they go to a float32.
        sums = tl.dot(x, weight, sums, max_num_imprecise_acc=BK)
    if ROW_SCALES:
        scale = tl.load(activation_scale_pointer + m, mask=m_mask, other=0)[:, None]
    else:
        scale = tl.load(activation_scale_pointer)
    value = sums * (scale * tl.load(weight_scale_pointer + n, mask=n_mask, other=0)[None, :])
    if HAS_BIAS:
        value += tl.load(bias_pointer + n, mask=n_mask, other=0).to(tl.float32)[None, :]
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_pointer + place, value.to(y_pointer.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])


def launch(x: Tensor, weight: Tensor, weight_scale: Tensor, activation_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `fp8_linear` on the device of its arguments, which are known to fit; by the reference where it has no float8."""
    if x.is_cuda and not multiplies_fp8(x.device):
        return fp8_linear_reference(x, weight, weight_scale, activation_scale, bias)
    rows, depth, columns = x.shape[:-1].numel(), x.shape[-1], len(weight)
    shape = torch.Size((*x.shape[:-1], columns))
    if shape.numel() == 0:
        return x.new_empty(shape)
    codes = to_fp8_rows(x.reshape(rows, depth), activation_scale)
    if torch_multiplies(x, weight):
        scales = activation_scale.view(-1, 1).expand(rows, 1).contiguous(), weight_scale.contiguous().view(1, -1)
        bias = None if bias is None else bias.to(x.dtype)
        return torch._scaled_mm(codes, weight.t(), *scales, bias, out_dtype=x.dtype).view(shape)
    y = x.new_empty(shape)
    tile = pick(TILES, rows, columns)
    launch_kernel(
        fp8_linear_kernel,
        (tile.programs(rows, columns),),
        codes,
        weight.contiguous(),
        weight_scale.contiguous(),
        activation_scale.contiguous(),
        given(bias, x),
        y,
        rows,
        columns,
        depth,
        ROW_SCALES=activation_scale.numel() > 1,
        HAS_BIAS=bias is not None,
        EVEN=depth % tile.depth == 0,
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.depth,
        warps=tile.warps,
        stages=tile.stages,
    )
    return y


def to_fp8_rows(x: Tensor, scale: Tensor) -> Tensor:
    """float8_e4m3fn [M, K] of `x` [M, K] / `scale` [1], or one a row, in one pass (see `to_fp8`)."""
    rows, columns = x.shape
    y = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    tile = row_tile(min(columns, WIDEST))
    launch_kernel(
        fp8_rows_kernel,
        (ceil_div(rows, tile.rows), ceil_div(columns, tile.columns)),
        x.contiguous(),
        scale.contiguous(),
        y,
        rows,
        columns,
        ROW_SCALES=scale.numel() > 1,
        BM=tile.rows,
        BK=tile.columns,
        warps=tile.warps,
    )
    return y


def torch_multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether torch has a product of float8 with a scale for every row and column here, which is faster than ours."""
    fits = all(number % ALIGNED == 0 for number in (*weight.shape, weight.data_ptr())) and weight.is_contiguous()
    return is_hopper(x.device) and x.dtype == torch.bfloat16 and fits and x.shape[:-1].numel() > ROWS


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the tensor cores of a GPU take float8_e4m3fn: from the 40 series on."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def forms() -> list[Form]:
    """What is compiled ahead of time: every tile, and float8 of usual rows."""
    types = ("*fp8e4nv", "*fp8e4nv", "*fp32", "*fp32", "*bf16", "*bf16", "i32", "i32", "i32")
    named = dict(zip(fp8_linear_kernel.arg_names, types, strict=False))
    return [*(_form(tile, row_scales, named) for tile in TILES for row_scales in (False, True)), _rows_form()]


def _rows_form() -> Form:
    tile = row_tile(WIDEST)
    types = dict(zip(fp8_rows_kernel.arg_names, ("*bf16", "*fp32", "*fp8e4nv", "i32", "i32"), strict=False))
    constants = {"ROW_SCALES": True, "BM": tile.rows, "BK": tile.columns}
    return Form("float8 of rows", fp8_rows_kernel, types, constants, tile.warps, 1, None, TARGETS)


def _form(tile: Tile, row_scales: bool, types: dict[str, str]) -> Form:
    constants = {
        "ROW_SCALES": row_scales,
        "HAS_BIAS": True,
        "EVEN": True,
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile.depth,
    }
    name = f"{'scale a row ' if row_scales else ''}{tile.rows}x{tile.columns}"
    return Form(name, fp8_linear_kernel, types, constants, tile.warps, tile.stages, "fp8", TARGETS)
