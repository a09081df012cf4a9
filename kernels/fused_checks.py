"""What the operations around the integer products ask of their arguments: quantising, convolving codes, attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_bias, check_codes, check_form, check_geometry, linear_depth, refuse

LONGEST_ROW = 16384
"""Columns of a row that one program of a kernel can keep in its registers."""
NORMS = ("layer", "rms")
"""Norms over the last axis: Ba et al. 2016, arXiv 1607.06450; Zhang and Sennrich 2019, arXiv 1910.07467."""
CONV_ACTIVATIONS = ("none", "silu")
"""What follows a convolution, or comes before it, in the same pass."""
LARGEST_GROUP = 4096
"""Channels of a group that one program of the statistics kernel can keep in its registers."""
LARGEST_HEAD = 128
"""Columns of a head that one program of the attention kernel can keep in its registers."""


def check_quantize_rows(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, bits: int) -> None:
    """The arguments of quantising `x` [..., K]."""
    depth = linear_depth(x)
    if scale is None and depth > LONGEST_ROW:
        raise ValueError(f"x must have at most {LONGEST_ROW} columns for a scale a row, got {depth}")
    _check_target("scale", scale, zero_point, bits)


def check_norm_modulate(
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
) -> None:
    """The arguments of normalising, modulating and quantising `x` [B, T, C]."""
    if x.ndim != 3 or not x.is_floating_point():
        refuse("x", "floating point [B, T, C]", x)
    batch, _, channels = x.shape
    if not 1 <= channels <= LONGEST_ROW:
        raise ValueError(f"x must have 1 to {LONGEST_ROW} channels, got {channels}")
    _check_floating("weight", weight, [channels])
    _check_floating("bias", bias, [channels])
    _check_floating("scale", scale, [batch, channels])
    _check_floating("shift", shift, [batch, channels])
    _check_target("activation_scale", activation_scale, zero_point, bits)
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    _check_eps(eps)


def check_group_norm(
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
) -> None:
    """The arguments of normalising the channel groups of `x` [B, C, H, W] and quantising them."""
    if x.ndim != 4 or not x.is_floating_point():
        refuse("x", "floating point [B, C, H, W]", x)
    channels = x.shape[1]
    if groups < 1 or channels < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of x, got {groups}")
    if channels // groups > LARGEST_GROUP:
        raise ValueError(f"groups must leave at most {LARGEST_GROUP} of the {channels} channels to each, got {groups}")
    _check_floating("weight", weight, [channels])
    _check_floating("bias", bias, [channels])
    _check_floating("smoothing", smoothing, [channels])
    _check_target("activation_scale", activation_scale, zero_point, bits)
    _check_eps(eps)
    _check_activation(activation)


def check_integer_conv2d(
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
) -> None:
    """The arguments of a convolution on codes [B, H, W, C]."""
    if codes.ndim != 4 or codes.dtype != torch.int8:
        refuse("codes", "torch.int8 [B, H, W, C]", codes)
    _check_activation(activation)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating point, got {dtype}")
    size = check_geometry("codes", codes, codes.shape[1:3], kernel_size, stride, padding, dilation)
    check_codes(codes.shape[3] * kernel_size[0] * kernel_size[1], weight, weight_bits)
    check_form("weight_scale", weight_scale, torch.float32, [len(weight)])
    check_form("activation_scale", activation_scale, torch.float32, [1])
    if zero_point is not None:
        check_form("zero_point", zero_point, torch.int32, [1])
    check_bias(bias, len(weight))
    _check_floating("residual", residual, [len(codes), *size, len(weight)])


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """The arguments of attention from `q` [B, H, T, D] to `k` and `v` [B, H, S, D]."""
    if q.ndim != 4 or not q.is_floating_point():
        refuse("q", "floating point [B, H, T, D]", q)
    batch, heads, _, columns = q.shape
    if not 1 <= columns <= LARGEST_HEAD:
        raise ValueError(f"q must have heads of 1 to {LARGEST_HEAD} columns, got {columns}")
    tokens = k.shape[2] if k.ndim == 4 else 0
    if tokens < 1 or k.dtype != q.dtype or list(k.shape) != [batch, heads, tokens, columns]:
        refuse("k", f"{q.dtype} [{batch}, {heads}, S, {columns}] with at least one token", k)
    check_form("v", v, q.dtype, list(k.shape))


def _check_target(name: str, scale: Tensor | None, zero_point: Tensor | None, bits: int) -> None:
    """The format that values are brought to; without a scale it is found from the values, and 0 keeps the code 0."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must lie in 2..8, got {bits}")
    if scale is not None:
        check_form(name, scale, torch.float32, [1])
    if zero_point is not None:
        if scale is None:
            raise ValueError(f"zero_point must be None without {name}: scales found from the values are symmetric")
        check_form("zero_point", zero_point, torch.int32, [1])


def _check_floating(name: str, tensor: Tensor | None, shape: list[int]) -> None:
    if tensor is not None and (not tensor.is_floating_point() or list(tensor.shape) != shape):
        refuse(name, f"floating point {shape}", tensor)


def _check_eps(eps: float) -> None:
    if eps <= 0:
        raise ValueError(f"eps must be greater than 0, got {eps}")


def _check_activation(activation: str) -> None:
    if activation not in CONV_ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(CONV_ACTIVATIONS)}, got {activation!r}")
