"""One call of the C++ layer: from floats or codes to floats."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..quantization import code_range
from ..windows import output_size
from .library import shared_library
from .panels import panels_of

TYPES = {torch.int8: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
"""Number formats that it reads, as layer.h counts them; it writes the floats."""
POINTWISE = ((1, 1), (1, 1), (0, 0), (1, 1))
"""Kernel size, stride, padding and dilation of a convolution that is a linear layer at every position."""


def computes(dtype: torch.dtype) -> bool:
    """Whether the library is there, and reads and writes such floats."""
    return shared_library() is not None and dtype in TYPES


def compute_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    *tensors: Tensor | None,
    dtype: torch.dtype,
    weight_bits: int,
    bits: int = 8,
) -> Tensor:
    """s_x s_w ((X - z) W) + b + r of `x` [..., K], floats or codes: [..., O] in `dtype`.

    `weight` [O, ...] is packed from [O, K]; the scales are s_w [O] and s_x, [1] or one a row; `tensors` are z, b and r, or
    None. All is known to fit, and `computes` to hold.
    """
    x = x.contiguous()
    call = _linear(
        x.shape, x.dtype, weight.shape[0], dtype, bits, activation_scale.shape[0] > 1, torch.get_num_threads()
    )
    return _compute(call, x, weight, (weight_scale, activation_scale, *tensors), dtype, weight_bits)


def compute_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    *tensors: Tensor | None,
    geometry: Sequence[Sequence[int]],
    dtype: torch.dtype,
    weight_bits: int,
    bits: int = 8,
) -> Tensor:
    """The same of images [B, C, H, W] and their convolution with `weight` [O, ...] of C*kh*kw codes: [B, H', W', O].

    `geometry` is kernel size, stride, padding and dilation.
    """
    strides = x.stride()
    if strides[1] != 1 and strides[3] != 1:
        x = x.contiguous()
        strides = x.stride()
    rows = activation_scale.shape[0] > 1
    places = tuple(map(tuple, geometry))
    call = _conv2d(x.shape, strides, places, x.dtype, weight.shape[0], dtype, bits, rows, torch.get_num_threads())
    return _compute(call, x, weight, (weight_scale, activation_scale, *tensors), dtype, weight_bits)


class Call(NamedTuple):
    """What calls of one form share; made once, since making it takes as long as a small layer."""

    form: ctypes.Array[ctypes.c_int64]
    """`Form` of layer.h."""
    channels: int
    taps: int
    output: tuple[int, ...]
    """The output's shape."""


@lru_cache(4096)
def _linear(
    shape: tuple[int, ...], given: torch.dtype, outputs: int, dtype: torch.dtype, bits: int, by_row: bool, threads: int
) -> Call:
    *lead, columns = shape
    rows = prod(lead)
    images = (1, columns, 1, rows, 0, 1, 0, columns, outputs, 1, rows)
    return Call(_form(images, POINTWISE, given, dtype, bits, by_row, threads), columns, 1, (*lead, outputs))


@lru_cache(4096)
def _conv2d(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    geometry: tuple[tuple[int, ...], ...],
    given: torch.dtype,
    outputs: int,
    dtype: torch.dtype,
    bits: int,
    by_row: bool,
    threads: int,
) -> Call:
    size = output_size(shape[2:], *geometry)
    form = _form((*shape, *strides, outputs, *size), geometry, given, dtype, bits, by_row, threads)
    return Call(form, shape[1], prod(geometry[0]), (shape[0], *size, outputs))


def _form(
    images: Sequence[int],
    geometry: Sequence[Sequence[int]],
    given: torch.dtype,
    dtype: torch.dtype,
    bits: int,
    by_row: bool,
    threads: int,
) -> ctypes.Array[ctypes.c_int64]:
    numbers = (TYPES[given], TYPES[dtype], *images, *chain(*geometry), *code_range(bits), by_row, threads)
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _compute(
    call: Call, x: Tensor, weight: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype, weight_bits: int
) -> Tensor:
    library = shared_library()
    assert library is not None
    weight_scale, activation_scale, zero_point, bias, residual = tensors
    panels = panels_of(weight, library, call.channels, call.taps, weight_bits)
    # Named, so that copies live until the call is over.
    read = (weight_scale, activation_scale, zero_point, _floats(bias), _floats(residual))
    whole = [None if tensor is None else tensor.contiguous() for tensor in read]
    output = torch.empty(call.output, dtype=dtype)
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in whole]
    if not library.diffpress_layer(call.form, x.data_ptr(), panels.address, *addresses, output.data_ptr()):
        raise MemoryError(f"codes of an input {list(x.shape)}")
    return output


def _floats(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == torch.float32 else tensor.float()
