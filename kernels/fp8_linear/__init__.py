"""Linear layer on float8 weights and float8 activations."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_fp8, linear_depth
from .reference import fp8_linear_reference

__all__ = ["fp8_linear"]


def fp8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, activation_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """`x` [..., K] times float8 weights: [..., N] in the dtype of `x`.

    `weight` is float8_e4m3fn [N, K]; `weight_scale` [N] and `activation_scale` [1] are float32, `bias` is [N]. Raises
    ValueError naming the argument that does not fit.
    """
    check_fp8(linear_depth(x), weight, weight_scale, activation_scale, bias)
    return torch.ops.diffpress.fp8_linear(x, weight, weight_scale, activation_scale, bias)


_op = torch.library.custom_op("diffpress::fp8_linear", fp8_linear_reference, mutates_args=())


@_op.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
