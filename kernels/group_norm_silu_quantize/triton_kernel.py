"""Triton kernels of `group_norm_silu_quantize`: statistics of every group, then norm, activation and codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Form
from ..blocks import activate
from ..launching import given, launch_kernel
from ..pixels import PixelTile, is_channels_last, pixel_tile
from ..quantization import code_range
from ..quantize_rows.triton_kernel import codes_of
from ..tiles import ceil_div

PROGRAMS = 256
"""How many programs the statistics are spread over where there are few groups: about two for each part of a large GPU."""
MOST_PARTS = 16
"""More parts of a group cost the second kernel, which adds them up in each of its programs, more than they give."""
WARPS = 4


class Parts(NamedTuple):
    """How the pixels of a group are cut for its statistics."""

    number: int
    pixels: int
    """Of each part but the last."""
    tile: PixelTile


@triton.jit
def load_pixels(x_pointer, p, c, inside, P, C, CHANNELS_LAST: tl.constexpr):
    """Float32 [BP, BC]: pixels `p` and channels `c` of one image; 0 outside."""
    p, c = p.to(tl.int64)[:, None], c.to(tl.int64)[None, :]
    place = p * C + c if CHANNELS_LAST else c * P + p
    return tl.load(x_pointer + place, mask=inside, other=0).to(tl.float32)


@triton.jit
def group_statistics_kernel(
    x_pointer,
    means_pointer,
    squares_pointer,
    P,
    C,
    G,
    part,
    CHANNELS_LAST: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Mean of one part of a group of channels, and the sum of squared distances from it.

    Both are summed around the mean of the first tile, so that what is added up is not much larger than it spreads.
    """
    image, group, width = tl.program_id(0) // G, tl.program_id(0) % G, C // G
    x_pointer += image.to(tl.int64) * C * P
    first = tl.program_id(1) * part
    last = min(first + part, P)
    column = tl.arange(0, BC)
    c, c_mask = group * width + column, column < width
    p = first + tl.arange(0, BP)
    inside = (p < last)[:, None] & c_mask[None, :]
    x = load_pixels(x_pointer, p, c, inside, P, C, CHANNELS_LAST)
    centre = tl.sum(tl.sum(x, 1), 0) / (max(min(last - first, BP), 1) * width)
    sums = tl.zeros((BP, BC), tl.float32)
    squares = tl.zeros((BP, BC), tl.float32)
    for start in range(first, last, BP):
        p = start + tl.arange(0, BP)
        inside = (p < last)[:, None] & c_mask[None, :]
        x = load_pixels(x_pointer, p, c, inside, P, C, CHANNELS_LAST)
        x = tl.where(inside, x - centre, 0)
        sums += x
        squares += x * x
    sum = tl.sum(tl.sum(sums, 1), 0)
    offset = sum / (max(last - first, 1) * width)
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(means_pointer + place, centre + offset)
    tl.store(squares_pointer + place, tl.maximum(tl.sum(tl.sum(squares, 1), 0) - offset * sum, 0))


@triton.jit
def group_norm_silu_quantize_kernel(
    x_pointer,
    means_pointer,
    squares_pointer,
    weight_pointer,
    bias_pointer,
    scale_pointer,
    zero_point_pointer,
    smoothing_pointer,
    codes_pointer,
    P,
    C,
    G,
    part,
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Codes of BP pixels and BC channels of one image; the parts of a group are put together as Chan et al. do."""
    image, width = tl.program_id(2), C // G
    p, c = tl.program_id(0) * BP + tl.arange(0, BP), tl.program_id(1) * BC + tl.arange(0, BC)
    c_mask = c < C
    inside = (p < P)[:, None] & c_mask[None, :]
    parts = tl.arange(0, PARTS)
    counts = (tl.clamp((P - parts * part).to(tl.float32), 0.0, part * 1.0) * width)[None, :]
    place = (image * G + c // width)[:, None] * PARTS + parts[None, :]
    means = tl.load(means_pointer + place, mask=c_mask[:, None], other=0)
    squares = tl.load(squares_pointer + place, mask=c_mask[:, None], other=0)
    total = P * 1.0 * width
    mean = tl.sum(means * counts, 1) / total
    distance = means - mean[:, None]
    variance = tl.sum(squares + counts * distance * distance, 1) / total
    weight = tl.load(weight_pointer + c, mask=c_mask, other=0).to(tl.float32)
    bias = tl.load(bias_pointer + c, mask=c_mask, other=0).to(tl.float32)
    x = load_pixels(x_pointer + image.to(tl.int64) * C * P, p, c, inside, P, C, CHANNELS_LAST)
    value = activate((x - mean[None, :]) * (tl.rsqrt(variance + EPS) * weight)[None, :] + bias[None, :], ACTIVATION)
    if HAS_SMOOTHING:
        value *= tl.load(smoothing_pointer + c, mask=c_mask, other=0).to(tl.float32)[None, :]
    zero_point = tl.load(zero_point_pointer).to(tl.float32) if HAS_ZERO else 0.0
    codes = codes_of(value, tl.load(scale_pointer), zero_point, LOW, HIGH)
    pixel = image.to(tl.int64) * P + p
    tl.store(codes_pointer + pixel[:, None] * C + c[None, :], codes, mask=inside)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation_scale: Tensor,
    zero_point: Tensor | None,
    smoothing: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
    bits: int,
) -> Tensor:
    """Compute `group_norm_silu_quantize` on the device of its arguments, which are known to fit."""
    batch, channels, height, width = x.shape
    codes = torch.empty(batch, height, width, channels, dtype=torch.int8, device=x.device)
    if codes.numel() == 0:
        return codes
    pixels, last = height * width, is_channels_last(x)
    x = x if last else x.contiguous()
    parts = parts_of(pixels, channels // groups, batch * groups)
    means, squares = torch.empty(2, batch * groups, parts.number, dtype=torch.float32, device=x.device)
    launch_kernel(
        group_statistics_kernel,
        (batch * groups, parts.number),
        x,
        means,
        squares,
        pixels,
        channels,
        groups,
        parts.pixels,
        CHANNELS_LAST=last,
        BP=parts.tile.pixels,
        BC=parts.tile.channels,
        warps=WARPS,
    )
    tile, (low, high) = pixel_tile(channels), code_range(bits)
    launch_kernel(
        group_norm_silu_quantize_kernel,
        (ceil_div(pixels, tile.pixels), ceil_div(channels, tile.channels), batch),
        x,
        means,
        squares,
        weight.contiguous(),
        bias.contiguous(),
        activation_scale.contiguous(),
        given(zero_point, codes),
        given(smoothing, codes),
        codes,
        pixels,
        channels,
        groups,
        parts.pixels,
        PARTS=parts.number,
        EPS=eps,
        ACTIVATION=activation,
        HAS_ZERO=zero_point is not None,
        HAS_SMOOTHING=smoothing is not None,
        LOW=low,
        HIGH=high,
        CHANNELS_LAST=last,
        BP=tile.pixels,
        BC=tile.channels,
        warps=WARPS,
    )
    return codes


def parts_of(pixels: int, width: int, groups: int) -> Parts:
    """How `groups` groups of `width` channels of so many pixels are cut; the number of parts is a power of two."""
    channels = triton.next_power_of_2(width)
    tile = PixelTile(max(1, min(512, 4096 // channels)), channels)
    wanted = min(MOST_PARTS, ceil_div(PROGRAMS, groups), ceil_div(pixels, tile.pixels))
    number = triton.next_power_of_2(wanted)
    return Parts(number, ceil_div(ceil_div(pixels, number), tile.pixels) * tile.pixels, tile)


def forms() -> list[Form]:
    """What is compiled ahead of time: both kernels on both ways in which images lie, narrow and wide groups."""
    statistics = [_statistics_form(channels, last) for channels in (320, 1280) for last in (False, True)]
    return [*statistics, _form(320, False), _form(320, True)]


def _statistics_form(channels: int, last: bool) -> Form:
    tile = parts_of(4096, channels // 32, 64).tile
    constants = {"CHANNELS_LAST": last, "BP": tile.pixels, "BC": tile.channels}
    names = group_statistics_kernel.arg_names
    types = dict(zip(names, ("*bf16", "*fp32", "*fp32", *["i32"] * 4), strict=False))
    name = f"statistics {'NHWC' if last else 'NCHW'} {tile.pixels}x{tile.channels}"
    return Form(name, group_statistics_kernel, types, constants, WARPS, 1, None)


def _form(channels: int, last: bool) -> Form:
    tile, parts = pixel_tile(channels), parts_of(4096, channels // 32, 64)
    pointers = ("*bf16", "*fp32", "*fp32", "*bf16", "*bf16", "*fp32", "*i32", "*fp32", "*i8")
    constants = {
        "PARTS": parts.number,
        "EPS": 1e-5,
        "ACTIVATION": "silu",
        "HAS_ZERO": True,
        "HAS_SMOOTHING": last,
        "LOW": -128,
        "HIGH": 127,
        "CHANNELS_LAST": last,
        "BP": tile.pixels,
        "BC": tile.channels,
    }
    types = dict(zip(group_norm_silu_quantize_kernel.arg_names, (*pointers, *["i32"] * 4), strict=False))
    name = f"norm {'NHWC' if last else 'NCHW'} {tile.pixels}x{tile.channels}"
    return Form(name, group_norm_silu_quantize_kernel, types, constants, WARPS, 1, None)
