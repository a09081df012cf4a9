"""Two-dimensional convolution on integer weights and integer activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..checks import check_quantized, conv2d_depth
from ..library import define_op
from ..windows import empty_output, memory_format
from .reference import quantized_conv2d_reference

__all__ = ["quantized_conv2d"]


def quantized_conv2d(
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
    """`x` [B, C, H, W] convolved with integer weights: [B, O, H', W'] in the dtype of `x`, zero padding, one group.

    `weight` [O, ...] is the kernel packed from [O, C*kh*kw] (see `pack_codes`); the other tensors are those of
    `quantized_linear`, with N = O. On a CPU the channels of the output lie beside each other, on a GPU its pixels. Raises
    ValueError naming what does not fit.
    """
    tensors = (x, weight, weight_scale, activation_scale, zero_point, bias)
    geometry = (list(kernel_size), list(stride), list(padding), list(dilation))
    return _operation(*tensors, *geometry, weight_bits, activation_bits)


def _check(x: Tensor, *rest: Any) -> None:
    geometry, bits = rest[5:9], rest[9:]
    check_quantized(conv2d_depth(x, *geometry), *rest[:5], *bits)


def _fake(
    x: Tensor, weight: Tensor, _s: Tensor, _a: Tensor, _z: Tensor | None, _b: Tensor | None, *rest: Any
) -> Tensor:
    return empty_output(x, weight, *rest[:4]).to(memory_format=memory_format(x))


_operation = define_op(__name__, quantized_conv2d_reference, _fake, on_cpu="cpu_kernel", check=_check)
