"""Triton kernel of `norm_modulate_quantize`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Form
from ..launching import given, launch_kernel
from ..quantization import code_range
from ..quantize_rows.triton_kernel import row_tile, store_codes
from ..tiles import ceil_div


@triton.jit
def norm_modulate_quantize_kernel(
    x_pointer,
    weight_pointer,
    bias_pointer,
    scale_pointer,
    shift_pointer,
    activation_scale_pointer,
    zero_point_pointer,
    codes_pointer,
    scales_pointer,
    M,
    T,
    C,
    scale_stride,
    shift_stride,
    RMS: tl.constexpr,
    EPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    STATIC: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """BM whole rows; row m belongs to image m // T. What is loaded is 0 outside, and so stays what is computed."""
    m, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BC)
    m_mask, c_mask = m < M, c < C
    inside = m_mask[:, None] & c_mask[None, :]
    place = m.to(tl.int64)[:, None] * C + c[None, :]
    value = tl.load(x_pointer + place, mask=inside, other=0).to(tl.float32)
    if not RMS:
        value = tl.where(inside, value - (tl.sum(value, 1) / C)[:, None], 0)
    value *= tl.rsqrt(tl.sum(value * value, 1) / C + EPS)[:, None]
    if HAS_WEIGHT:
        value *= tl.load(weight_pointer + c, mask=c_mask, other=0).to(tl.float32)[None, :]
    if HAS_BIAS:
        value += tl.load(bias_pointer + c, mask=c_mask, other=0).to(tl.float32)[None, :]
    image = (m // T).to(tl.int64)[:, None]
    if HAS_SCALE:
        value *= 1 + tl.load(scale_pointer + image * scale_stride + c[None, :], mask=inside, other=0).to(tl.float32)
    if HAS_SHIFT:
        value += tl.load(shift_pointer + image * shift_stride + c[None, :], mask=inside, other=0).to(tl.float32)
    store_codes(
        value, m, place, m_mask, inside, activation_scale_pointer, zero_point_pointer, codes_pointer, scales_pointer,
        STATIC, HAS_ZERO, LOW, HIGH,
    )  # fmt: skip


def launch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation_scale: Tensor | None,
    zero_point: Tensor | None,
    norm: str,
    eps: float,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """Compute `norm_modulate_quantize` on the device of its arguments, which are known to fit."""
    batch, tokens, channels = x.shape
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if codes.numel() == 0:
        found = torch.empty(0, dtype=torch.float32, device=x.device)
        return codes, found if activation_scale is None else activation_scale.clone()
    scales = torch.empty(batch * tokens if activation_scale is None else 1, dtype=torch.float32, device=x.device)
    scale, shift = _dense_rows(scale), _dense_rows(shift)
    low, high = code_range(bits)
    tile = row_tile(channels)
    launch_kernel(
        norm_modulate_quantize_kernel,
        (ceil_div(batch * tokens, tile.rows),),
        x.contiguous(),
        given(weight, codes),
        given(bias, codes),
        codes if scale is None else scale,
        codes if shift is None else shift,
        given(activation_scale, codes),
        given(zero_point, codes),
        codes,
        scales,
        batch * tokens,
        tokens,
        channels,
        0 if scale is None else scale.stride(0),
        0 if shift is None else shift.stride(0),
        RMS=norm == "rms",
        EPS=eps,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_SCALE=scale is not None,
        HAS_SHIFT=shift is not None,
        STATIC=activation_scale is not None,
        HAS_ZERO=zero_point is not None,
        LOW=low,
        HIGH=high,
        BM=tile.rows,
        BC=tile.columns,
        warps=tile.warps,
    )
    return codes, scales


def _dense_rows(modulation: Tensor | None) -> Tensor | None:
    """Parts of one projection, which modulations mostly are, are read where they lie."""
    return modulation if modulation is None or modulation.stride(1) == 1 else modulation.contiguous()


def forms() -> list[Form]:
    """What is compiled ahead of time: narrow, usual and the widest rows, and a given scale."""
    return [_form(320, False, False), _form(1152, False, True), _form(3072, True, False), _form(16384, False, False)]


def _form(channels: int, rms: bool, static: bool) -> Form:
    tile = row_tile(channels)
    pointers = ("*bf16", "*bf16", "*bf16", "*bf16", "*bf16", "*fp32", "*i32", "*i8", "*fp32")
    names = norm_modulate_quantize_kernel.arg_names
    constants = {
        "RMS": rms,
        "EPS": 1e-6,
        "HAS_WEIGHT": True,
        "HAS_BIAS": not rms,
        "HAS_SCALE": True,
        "HAS_SHIFT": True,
        "STATIC": static,
        "HAS_ZERO": static,
        "LOW": -128,
        "HIGH": 127,
        "BM": tile.rows,
        "BC": tile.columns,
    }
    types = dict(zip(names, (*pointers, *["i32"] * 5), strict=False))
    name = f"{'rms' if rms else 'layer'} {'given scale' if static else 'scale a row'} {tile.rows}x{tile.columns}"
    return Form(name, norm_modulate_quantize_kernel, types, constants, tile.warps, 1, None)
