"""What the operations ask of their arguments: a ValueError names the first one that does not fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .packing import WEIGHT_BITS, packed_form
from .windows import output_size


def linear_depth(x: Tensor) -> int:
    """Length of the sums of a linear layer over `x`. Raises ValueError unless `x` is floating point [..., K]."""
    if x.ndim == 0 or not x.is_floating_point():
        _refuse("x", "floating point [..., K]", x)
    return x.shape[-1]


def conv2d_depth(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> int:
    """Length of the sums of a convolution over `x`. Raises ValueError where the geometry does not fit [B, C, H, W]."""
    if x.ndim != 4 or not x.is_floating_point():
        _refuse("x", "floating point [B, C, H, W]", x)
    geometry = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    for name, pair in geometry.items():
        if len(pair) != 2:
            raise ValueError(f"{name} must be two numbers, got {list(pair)}")
    if min(output_size(x.shape[2:], **geometry)) < 1:
        raise ValueError(f"kernel_size {list(kernel_size)} reaches beyond x {list(x.shape)} padded by {list(padding)}")
    return x.shape[1] * kernel_size[0] * kernel_size[1]


def check_quantized(
    depth: int,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    activation_bits: int,
) -> None:
    """The arguments of products of `depth` terms between integer weights and integer activations."""
    if not 2 <= activation_bits <= 8:
        raise ValueError(f"activation_bits must lie in 2..8, got {activation_bits}")
    _check_codes(depth, weight, weight_bits)
    _check("weight_scale", weight_scale, torch.float32, [len(weight)])
    _check("activation_scale", activation_scale, torch.float32, [1])
    if zero_point is not None:
        _check("zero_point", zero_point, torch.int32, [1])
    _check_bias(bias, len(weight))


def check_integer_linear(
    codes: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    weight_bits: int,
    group_size: int,
    activation: str,
    dtype: torch.dtype,
) -> None:
    """The arguments of a linear layer on codes [..., K]."""
    if codes.ndim == 0 or codes.dtype != torch.int8:
        _refuse("codes", "torch.int8 [..., K]", codes)
    if group_size < 0:
        raise ValueError(f"group_size must be 0, for one scale a row, or more, got {group_size}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating point, got {dtype}")
    depth, outputs, rows = codes.shape[-1], len(weight), codes.shape[:-1].numel()
    _check_codes(depth, weight, weight_bits)
    groups = [-(-depth // group_size)] if group_size else []
    _check("weight_scale", weight_scale, torch.float32, [outputs, *groups])
    if activation_scale.dtype != torch.float32 or activation_scale.shape not in [(1,), (rows,)]:
        _refuse("activation_scale", f"torch.float32 [1] or [{rows}]", activation_scale)
    if zero_point is not None:
        _check("zero_point", zero_point, torch.int32, [1])
    _check_bias(bias, outputs)
    if activation == "geglu" and outputs % 2:
        raise ValueError(f"activation geglu halves the outputs: weight must have an even number of rows, got {outputs}")
    shape = [*codes.shape[:-1], outputs // (2 if activation == "geglu" else 1)]
    if residual is not None and (not residual.is_floating_point() or list(residual.shape) != shape):
        _refuse("residual", f"floating point {shape}", residual)


def check_weight_only(
    depth: int, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, weight_bits: int, group_size: int
) -> None:
    """The arguments of products of `depth` terms between integer weights with a scale a group, and floats."""
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    _check_codes(depth, weight, weight_bits)
    _check("weight_scale", weight_scale, torch.float32, [len(weight), -(-depth // group_size)])
    _check_bias(bias, len(weight))


def check_fp8(depth: int, weight: Tensor, weight_scale: Tensor, activation_scale: Tensor, bias: Tensor | None) -> None:
    """The arguments of products of `depth` terms between float8 weights and float8 activations."""
    _check_matrix(weight, torch.float8_e4m3fn, depth, "")
    _check("weight_scale", weight_scale, torch.float32, [len(weight)])
    _check("activation_scale", activation_scale, torch.float32, [1])
    _check_bias(bias, len(weight))


def _check_codes(depth: int, weight: Tensor, bits: int) -> None:
    if bits not in WEIGHT_BITS:
        raise ValueError(f"weight_bits must be 2, 3, 4 or 8, got {bits}")
    _check_matrix(weight, *packed_form(depth, bits), f" at {bits} bits")


def _check_matrix(weight: Tensor, dtype: torch.dtype, columns: int, where: str) -> None:
    if weight.ndim != 2 or (weight.dtype, weight.shape[1]) != (dtype, columns):
        _refuse("weight", f"{dtype} [N, {columns}]{where}", weight)


def _check_bias(bias: Tensor | None, rows: int) -> None:
    if bias is not None and (not bias.is_floating_point() or list(bias.shape) != [rows]):
        _refuse("bias", f"floating point [{rows}]", bias)


def _check(name: str, given: Tensor, dtype: torch.dtype, shape: list[int]) -> None:
    if given.dtype != dtype or list(given.shape) != shape:
        _refuse(name, f"{dtype} {shape}", given)


def _refuse(name: str, wanted: str, given: Tensor) -> None:
    raise ValueError(f"{name} must be {wanted}, got {given.dtype} {list(given.shape)}")
