"""Triton kernels of `quantized_conv2d`: codes with the channels last, then the convolution on integers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Form
from ..group_norm_silu_quantize.triton_kernel import load_pixels
from ..integer_conv2d.triton_kernel import TILES, conv_form, convolve
from ..launching import given, launch_kernel
from ..pixels import is_channels_last, pixel_tile
from ..quantization import code_range
from ..quantize_rows.triton_kernel import codes_of
from ..tiles import ceil_div
from ..windows import empty_output

WARPS = 4


@triton.jit
def quantize_pixels_kernel(
    x_pointer,
    scale_pointer,
    zero_point_pointer,
    codes_pointer,
    P,
    C,
    HAS_ZERO: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Codes of BP pixels and BC channels of one image."""
    p, c = tl.program_id(0) * BP + tl.arange(0, BP), tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (p < P)[:, None] & (c < C)[None, :]
    image = tl.program_id(2).to(tl.int64)
    value = load_pixels(x_pointer + image * C * P, p, c, inside, P, C, CHANNELS_LAST)
    zero_point = tl.load(zero_point_pointer).to(tl.float32) if HAS_ZERO else 0.0
    codes = codes_of(value, tl.load(scale_pointer), zero_point, LOW, HIGH)
    tl.store(codes_pointer + (image * P + p)[:, None] * C + c[None, :], codes, mask=inside)


def launch(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    weight_bits: int,
    activation_bits: int,
) -> Tensor:
    """Compute `quantized_conv2d` on the device of its arguments, which are known to fit."""
    y = empty_output(x, weight, kernel_size, stride, padding, dilation)
    if y.numel():
        codes = quantize_pixels(x, activation_scale, zero_point, activation_bits)
        # Written with the channels first, as the reference does, so that nothing is moved afterwards.
        convolve(
            codes, weight, weight_scale, activation_scale, zero_point, bias, None,
            kernel_size, stride, padding, dilation, weight_bits, "none", y, channels_first=True,
        )  # fmt: skip
    return y


def quantize_pixels(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """int8 codes [B, H, W, C] of `x` [B, C, H, W], whichever way it lies in memory."""
    batch, channels, height, width = x.shape
    codes = torch.empty(batch, height, width, channels, dtype=torch.int8, device=x.device)
    last, tile, (low, high) = is_channels_last(x), pixel_tile(channels), code_range(bits)
    pixels = height * width
    if codes.numel() == 0:
        return codes
    launch_kernel(
        quantize_pixels_kernel,
        (ceil_div(pixels, tile.pixels), ceil_div(channels, tile.channels), batch),
        x if last else x.contiguous(),
        scale.contiguous(),
        given(zero_point, codes),
        codes,
        pixels,
        channels,
        HAS_ZERO=zero_point is not None,
        LOW=low,
        HIGH=high,
        CHANNELS_LAST=last,
        BP=tile.pixels,
        BC=tile.channels,
        warps=WARPS,
    )
    return codes


def forms() -> list[Form]:
    """What is compiled ahead of time: codes of both ways in which images lie, and the convolution of either zero."""
    convolutions = [conv_form(TILES[0], "none", zero, True) for zero in (False, True)]
    return [*convolutions, *(_form(last) for last in (False, True))]


def _form(last: bool) -> Form:
    tile = pixel_tile(320)
    constants = {
        "HAS_ZERO": True,
        "LOW": -128,
        "HIGH": 127,
        "CHANNELS_LAST": last,
        "BP": tile.pixels,
        "BC": tile.channels,
    }
    types = dict(zip(quantize_pixels_kernel.arg_names, ("*bf16", "*fp32", "*i32", "*i8", "i32", "i32"), strict=False))
    return Form(f"codes of {'NHWC' if last else 'NCHW'}", quantize_pixels_kernel, types, constants, WARPS, 1, None)
