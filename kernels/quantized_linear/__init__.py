"""Linear layer on integer weights and integer activations."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_packed
from .reference import quantized_linear_reference

__all__ = ["quantized_linear"]


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    activation_bits: int,
) -> Tensor:
    """`x` [..., K] times integer weights: [..., N] in the dtype of `x`.

    `weight` is int8 [N, K] at 8 bits and uint8 [N, ceil(K / 2)] at 4 (see `pack_int4`); `weight_scale` [N] and
    `activation_scale` [1] are float32, `bias` is [N]. Raises ValueError naming the argument that does not fit.
    """
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [..., K], got {x.dtype} {list(x.shape)}")
    check_packed(x.shape[-1], weight, weight_scale, activation_scale, bias, weight_bits, activation_bits)
    return torch.ops.diffpress.quantized_linear(
        x, weight, weight_scale, activation_scale, bias, weight_bits, activation_bits
    )


_op = torch.library.custom_op("diffpress::quantized_linear", quantized_linear_reference, mutates_args=())


@_op.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
