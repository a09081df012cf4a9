"""One call of the C++ layer: from floats or codes to floats."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

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
    x: Tensor, weight: Tensor, *tensors: Tensor | None, dtype: torch.dtype, weight_bits: int, bits: int = 8
) -> Tensor:
    """s_x s_w ((X - z) W) + b + r of `x` [..., K], floats or codes: [..., O] in `dtype`.

    `weight` [O, ...] is packed from [O, K]; `tensors` are the scales s_w [O] and s_x, [1] or one a row, then z, b and r or
    None. All is known to fit, and `computes` to hold.
    """
    x, rows, columns = x.contiguous(), x.shape[:-1].numel(), x.shape[-1]
    output = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)
    images = (1, columns, 1, rows, 0, 1, 0, columns, weight.shape[0], 1, rows)
    _call(images, POINTWISE, (weight_bits, bits), x, weight, tensors, output)
    return output


def compute_conv2d(
    x: Tensor,
    weight: Tensor,
    *tensors: Tensor | None,
    geometry: Sequence[Sequence[int]],
    dtype: torch.dtype,
    weight_bits: int,
    bits: int = 8,
) -> Tensor:
    """The same of images [B, C, H, W] and their convolution with `weight` [O, ...] of C*kh*kw codes: [B, H', W', O].

    `geometry` is kernel size, stride, padding and dilation.
    """
    if x.stride(1) != 1 and x.stride(3) != 1:
        x = x.contiguous()
    size = output_size(x.shape[2:], *geometry)
    output = torch.empty((len(x), *size, weight.shape[0]), dtype=dtype)
    _call((*x.shape, *x.stride(), weight.shape[0], *size), geometry, (weight_bits, bits), x, weight, tensors, output)
    return output


def _call(
    images: Sequence[int],
    geometry: Sequence[Sequence[int]],
    bits: tuple[int, int],
    x: Tensor,
    weight: Tensor,
    tensors: Sequence[Tensor | None],
    output: Tensor,
) -> None:
    library, (weight_scale, activation_scale, zero_point, bias, residual) = shared_library(), tensors
    assert library is not None
    assert activation_scale is not None
    read = (weight_scale, activation_scale, zero_point, _floats(bias), _floats(residual), output)
    # Named, so that copies live until the call is over.
    whole = [None if tensor is None else tensor.contiguous() for tensor in read]
    kernel_size, stride, padding, dilation = geometry
    panels = panels_of(weight, library, images[1], kernel_size[0] * kernel_size[1], bits[0])
    form = _form(
        *(TYPES[x.dtype], TYPES[output.dtype], *images, *kernel_size, *stride, *padding, *dilation),
        *(*code_range(bits[1]), activation_scale.shape[0] > 1, torch.get_num_threads()),
    )
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in whole)
    library.diffpress_layer(form, x.data_ptr(), panels.address, *addresses)


@lru_cache(4096)
def _form(*numbers: int) -> ctypes.Array[ctypes.c_int64]:
    """`Form` of layer.h; made once for each form of layer, since making it takes as long as a small layer."""
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()
