"""What the operations ask of their arguments: a ValueError names the first one that does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .packing import WEIGHT_BITS, packed_form
from .windows import output_size

LARGEST_RANK = 128
"""Of a low-rank branch that is computed beside a layer."""
BLOCKS = (32, 64)
"""Sizes of the blocks of a sparse weight: what tensor cores take at once."""


def linear_depth(x: Tensor) -> int:
    """Length of the sums of a linear layer over `x`. Raises ValueError unless `x` is floating point [..., K]."""
    if x.ndim == 0 or not x.is_floating_point():
        refuse("x", "floating point [..., K]", x)
    return x.shape[-1]


def conv2d_depth(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> int:
    """Length of the sums of a convolution over `x`. Raises ValueError where the geometry does not fit [B, C, H, W]."""
    if x.ndim != 4 or not x.is_floating_point():
        refuse("x", "floating point [B, C, H, W]", x)
    check_geometry("x", x, x.shape[2:], kernel_size, stride, padding, dilation)
    return x.shape[1] * kernel_size[0] * kernel_size[1]


def check_geometry(
    name: str,
    images: Tensor,
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Height and width after a convolution of `images`, which have `size`; `name` is what the error calls them."""
    geometry = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    for argument, pair in geometry.items():
        least = 0 if argument == "padding" else 1
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{argument} must be two numbers, each at least {least}, got {list(pair)}")
    after = output_size(size, **geometry)
    if min(after) < 1:
        raise ValueError(
            f"kernel_size {list(kernel_size)} reaches beyond {name} {list(images.shape)} padded by {list(padding)}"
        )
    return after


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
    check_codes(depth, weight, weight_bits)
    check_form("weight_scale", weight_scale, torch.float32, [len(weight)])
    check_form("activation_scale", activation_scale, torch.float32, [1])
    if zero_point is not None:
        check_form("zero_point", zero_point, torch.int32, [1])
    check_bias(bias, len(weight))


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
        refuse("codes", "torch.int8 [..., K]", codes)
    if group_size < 0:
        raise ValueError(f"group_size must be 0, for one scale a row, or more, got {group_size}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating point, got {dtype}")
    depth, outputs = codes.shape[-1], len(weight)
    check_codes(depth, weight, weight_bits)
    groups = [-(-depth // group_size)] if group_size else []
    check_form("weight_scale", weight_scale, torch.float32, [outputs, *groups])
    _check_activation_scale(activation_scale, codes.shape[:-1])
    if zero_point is not None:
        check_form("zero_point", zero_point, torch.int32, [1])
    check_bias(bias, outputs)
    if activation == "geglu" and outputs % 2:
        raise ValueError(f"activation geglu halves the outputs: weight must have an even number of rows, got {outputs}")
    shape = [*codes.shape[:-1], outputs // (2 if activation == "geglu" else 1)]
    if residual is not None and (not residual.is_floating_point() or list(residual.shape) != shape):
        refuse("residual", f"floating point {shape}", residual)


def check_weight_only(
    depth: int, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, weight_bits: int, group_size: int
) -> None:
    """The arguments of products of `depth` terms between integer weights with a scale a group, and floats."""
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    check_codes(depth, weight, weight_bits)
    check_form("weight_scale", weight_scale, torch.float32, [len(weight), -(-depth // group_size)])
    check_bias(bias, len(weight))


def check_fp8(
    depth: int,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    bias: Tensor | None,
    lead: Sequence[int] = (),
) -> None:
    """The arguments of products of `depth` terms between float8 weights and float8 activations, in [*lead] rows."""
    check_matrix(weight, torch.float8_e4m3fn, depth, "")
    check_form("weight_scale", weight_scale, torch.float32, [len(weight)])
    _check_activation_scale(activation_scale, lead)
    check_bias(bias, len(weight))


def check_branch(depth: int, outputs: int, down: Tensor, up: Tensor) -> None:
    """The low-rank branch beside a layer of `depth` inputs and `outputs`."""
    if down.ndim != 2 or not down.is_floating_point() or down.shape[1] != depth or not 1 <= len(down) <= LARGEST_RANK:
        refuse("down", f"floating point [1..{LARGEST_RANK}, {depth}]", down)
    if not up.is_floating_point() or list(up.shape) != [outputs, len(down)]:
        refuse("up", f"floating point [{outputs}, {len(down)}]", up)


def check_block_sparse(
    x: Tensor,
    values: Tensor,
    column_index: Tensor,
    row_pointer: Tensor,
    weight_scale: Tensor | None,
    activation_scale: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    dtype: torch.dtype,
) -> None:
    """The arguments of a linear layer of `outputs` on blocks of weights; what the indices point at is not looked into."""
    if x.ndim == 0 or not (x.is_floating_point() or x.dtype == torch.int8):
        refuse("x", "floating point or torch.int8 [..., K]", x)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating point, got {dtype}")
    if values.ndim != 3 or values.dtype != x.dtype or values.shape[1] not in BLOCKS or len(set(values.shape[1:])) != 1:
        refuse("values", f"{x.dtype}, as x is, [blocks, B, B] with B one of {BLOCKS}", values)
    check_form("column_index", column_index, torch.int32, [len(values)])
    check_form("row_pointer", row_pointer, torch.int32, [-(-outputs // values.shape[1]) + 1])
    for name, scale in (("weight_scale", weight_scale), ("activation_scale", activation_scale)):
        if (scale is None) == (x.dtype == torch.int8):
            raise ValueError(f"{name} must {'' if scale is None else 'not '}be given where x is {x.dtype}")
    if weight_scale is not None and activation_scale is not None:
        check_form("weight_scale", weight_scale, torch.float32, [outputs])
        _check_activation_scale(activation_scale, x.shape[:-1])
    check_bias(bias, outputs)


def check_semi_structured(
    depth: int, dtype: torch.dtype, values: Tensor, positions: Tensor, bias: Tensor | None
) -> None:
    """The arguments of a linear layer of `depth` inputs of which every weight uses two of four."""
    if depth % 4:
        raise ValueError(f"x must be [..., K] with K a multiple of 4, got {depth}")
    check_matrix(values, dtype, depth // 2, "", "values")
    check_form("positions", positions, torch.uint8, [len(values), -(-depth // 8)])
    check_bias(bias, len(values))


def check_codes(depth: int, weight: Tensor, bits: int) -> None:
    if bits not in WEIGHT_BITS:
        raise ValueError(f"weight_bits must be 2, 3, 4 or 8, got {bits}")
    check_matrix(weight, *packed_form(depth, bits), f" at {bits} bits")


def check_matrix(weight: Tensor, dtype: torch.dtype, columns: int, where: str, name: str = "weight") -> None:
    if weight.ndim != 2 or (weight.dtype, weight.shape[1]) != (dtype, columns):
        refuse(name, f"{dtype} [N, {columns}]{where}", weight)


def check_bias(bias: Tensor | None, rows: int) -> None:
    if bias is not None and (not bias.is_floating_point() or list(bias.shape) != [rows]):
        refuse("bias", f"floating point [{rows}]", bias)


def _check_activation_scale(scale: Tensor, lead: Sequence[int]) -> None:
    # The rows are counted last: while a graph is exported, counting them would fix their number.
    if scale.dtype != torch.float32 or (scale.shape != (1,) and scale.shape != (prod(lead),)):
        refuse("activation_scale", "torch.float32 [1]" + (f" or [{prod(lead)}]" if lead else ""), scale)


def check_form(name: str, given: Tensor, dtype: torch.dtype, shape: list[int]) -> None:
    if given.dtype != dtype or list(given.shape) != shape:
        refuse(name, f"{dtype} {shape}", given)


def refuse(name: str, wanted: str, given: Tensor) -> None:
    raise ValueError(f"{name} must be {wanted}, got {given.dtype} {list(given.shape)}")
