"""Triton kernel of `integer_conv2d`: an implicit matrix product, whose rows are windows that are never written down."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Form
from ..blocks import activate, tile_of
from ..integer_linear.triton_kernel import sums_of_columns
from ..kept import kept_with
from ..launching import given, launch_kernel
from ..spreading import spread_codes, spread_form
from ..tiles import Tile, is_hopper, pick
from ..windows import output_size

TILES = (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4), Tile(16, 64, 128, 4, 4))
"""For large outputs, for small ones, for few positions."""
HOPPER_TILES = (Tile(128, 128, 128, 8, 3), Tile(64, 128, 128, 4, 4), Tile(64, 64, 128, 4, 4), Tile(16, 64, 128, 4, 4))
"""Chosen by `bench/gpu/tiles.py` on an H100."""
SHALLOW = 64
"""Depth of a tile where the channels are no multiple of its own: a sixth of the work would be lost on 320."""


@triton.jit
def integer_conv2d_kernel(
    x_pointer,
    weight_pointer,
    weight_scale_pointer,
    activation_scale_pointer,
    zero_point_pointer,
    weight_sums_pointer,
    bias_pointer,
    residual_pointer,
    y_pointer,
    M,
    N,
    H,
    W,
    C,
    OUT_H,
    OUT_W,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    PAD_Y: tl.constexpr,
    PAD_X: tl.constexpr,
    STEP_Y: tl.constexpr,
    STEP_X: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One tile of the output: BM of its M = B * H' * W' positions, BN of its N channels. EVEN: BK divides C."""
    row, column = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN))
    m, n = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    m_mask, n_mask = m < M, n < N
    image, pixel = m // (OUT_H * OUT_W), m % (OUT_H * OUT_W)
    top, left = pixel // OUT_W * STRIDE_Y - PAD_Y, pixel % OUT_W * STRIDE_X - PAD_X
    outside = 0
    if HAS_ZERO:
        # What lies outside reads as the code of 0, of which the sums of the weights take as much away again.
        zero_point = tl.load(zero_point_pointer)
        outside = zero_point.to(tl.int8)
    rows = weight_pointer + n.to(tl.int64) * (KH * KW * C)
    sums = tl.zeros((BM, BN), tl.int32)
    blocks = tl.cdiv(C, BK)
    for step in range(0, KH * KW * blocks):
        tap = step // blocks
        c = step % blocks * BK + tl.arange(0, BK)
        y, x = top + tap // KW * STEP_Y, left + tap % KW * STEP_X
        m_inside = m_mask & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        inside = m_inside[:, None] if EVEN else m_inside[:, None] & (c < C)[None, :]
        pixels = x_pointer + ((image * H + y).to(tl.int64) * W + x) * C
        codes = tl.load(pixels[:, None] + c[None, :], mask=inside, other=outside)
        w_mask = n_mask[None, :] if EVEN else n_mask[None, :] & (c < C)[:, None]
        weight = tl.load(rows[None, :] + tap * C + c[:, None], mask=w_mask, other=0)
        sums = tl.dot(codes, weight, sums, out_dtype=tl.int32)
    if HAS_ZERO:
        sums -= zero_point * tl.load(weight_sums_pointer + n, mask=n_mask, other=0)[None, :]
    scale = tl.load(activation_scale_pointer) * tl.load(weight_scale_pointer + n, mask=n_mask, other=0)
    value = sums.to(tl.float32) * scale[None, :]
    if HAS_BIAS:
        value += tl.load(bias_pointer + n, mask=n_mask, other=0).to(tl.float32)[None, :]
    value = activate(value, ACTIVATION)
    if CHANNELS_FIRST:
        place = (image.to(tl.int64)[:, None] * N + n[None, :]) * (OUT_H * OUT_W) + pixel[:, None]
    else:
        place = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = m_mask[:, None] & n_mask[None, :]
    if HAS_RESIDUAL:
        value += tl.load(residual_pointer + place, mask=inside, other=0).to(tl.float32)
    tl.store(y_pointer + place, value.to(y_pointer.dtype.element_ty), mask=inside)


def launch(
    codes: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    weight_bits: int,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Compute `integer_conv2d` on the device of its arguments, which are known to fit."""
    size = output_size(codes.shape[1:3], kernel_size, stride, padding, dilation)
    y = torch.empty(len(codes), *size, len(weight), dtype=dtype, device=codes.device)
    convolve(
        codes, weight, weight_scale, activation_scale, zero_point, bias, residual,
        kernel_size, stride, padding, dilation, weight_bits, activation, y, channels_first=False,
    )  # fmt: skip
    return y


def convolve(
    codes: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    weight_bits: int,
    activation: str,
    y: Tensor,
    channels_first: bool,
) -> None:
    """Write the output into the contiguous `y` [B, H', W', O], or [B, O, H', W'] with the `channels_first`."""
    batch, height, width, channels = codes.shape
    out_height, out_width = y.shape[2:] if channels_first else y.shape[1:3]
    rows, columns = batch * out_height * out_width, len(weight)
    if y.numel() == 0:
        return
    tile = tile_for(rows, columns, channels, is_hopper(codes.device))
    taps = kernel_size[0] * kernel_size[1]
    sums = codes if zero_point is None else sums_of_columns(weight, channels * taps, weight_bits, channels * taps)
    weight = weight_by_taps(weight, channels, taps, weight_bits)
    launch_kernel(
        integer_conv2d_kernel,
        (tile.programs(rows, columns),),
        codes.contiguous(),
        weight,
        weight_scale.contiguous(),
        activation_scale.contiguous(),
        given(zero_point, codes),
        sums,
        given(bias, codes),
        given(residual, codes),
        y,
        rows,
        columns,
        height,
        width,
        channels,
        out_height,
        out_width,
        KH=kernel_size[0],
        KW=kernel_size[1],
        STRIDE_Y=stride[0],
        STRIDE_X=stride[1],
        PAD_Y=padding[0],
        PAD_X=padding[1],
        STEP_Y=dilation[0],
        STEP_X=dilation[1],
        HAS_ZERO=zero_point is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation,
        CHANNELS_FIRST=channels_first,
        EVEN=channels % tile.depth == 0,
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.depth,
        warps=tile.warps,
        stages=tile.stages,
    )


def weight_by_taps(weight: Tensor, channels: int, taps: int, bits: int) -> Tensor:
    """int8 [O, taps * C] from packed codes: kept with those of 8 bits, and made by every call from fewer, which save memory."""
    make = partial(spread_codes, weight, channels * taps, bits, taps)
    # Of one tap or one channel they lie so already.
    return kept_with(weight, ("taps", taps), make) if bits == 8 and taps > 1 < channels else make()


def tile_for(rows: int, columns: int, channels: int, hopper: bool) -> Tile:
    """The tile that a convolution's output is cut into."""
    tile = pick(HOPPER_TILES if hopper else TILES, rows, columns)
    return tile if channels % tile.depth == 0 else tile._replace(depth=SHALLOW)


def forms() -> list[Form]:
    """What is compiled ahead of time: every tile, the largest also with all that it can take; weights of every width."""
    whole = [conv_form(tile, "none", False, False) for tile in TILES]
    whole += [conv_form(tile, "none", True, False)._replace(targets=("sm_90",)) for tile in HOPPER_TILES]
    return [*whole, conv_form(TILES[0], "silu", True, False), *(spread_form(bits, 9) for bits in (2, 3, 4, 8))]


def conv_form(tile: Tile, activation: str, zero: bool, channels_first: bool) -> Form:
    """A 3x3 convolution with stride 1."""
    pointers = ("*i8", "*i8", "*fp32", "*fp32", "*i32", "*i32", "*bf16", "*bf16", "*bf16")
    names = integer_conv2d_kernel.arg_names
    constants = {
        **dict.fromkeys(("KH", "KW"), 3),
        **dict.fromkeys(("STRIDE_Y", "STRIDE_X", "PAD_Y", "PAD_X", "STEP_Y", "STEP_X"), 1),
        "HAS_ZERO": zero,
        "HAS_BIAS": True,
        "HAS_RESIDUAL": zero and not channels_first,
        "ACTIVATION": activation,
        "CHANNELS_FIRST": channels_first,
        "EVEN": True,
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile.depth,
    }
    types = dict(zip(names, (*pointers, *["i32"] * 7), strict=False))
    extra = (" zero point" if zero else "") + (" channels first" if channels_first else " residual" if zero else "")
    name = f"3x3 {activation}{extra} {tile.rows}x{tile.columns}"
    return Form(name, integer_conv2d_kernel, types, constants, tile.warps, tile.stages, "int8")
