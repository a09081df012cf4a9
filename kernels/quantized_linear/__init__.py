"""Linear layer on integer weights and integer activations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..checks import check_quantized, linear_depth
from ..library import define_op, like_rows
from .reference import quantized_linear_reference

__all__ = ["quantized_linear"]


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    activation_bits: int,
) -> Tensor:
    """`x` [..., K] times integer weights: [..., N] in the dtype of `x`.

    `weight` [N, ...] is packed from [N, K] (see `pack_codes`); `weight_scale` [N] and `activation_scale` [1] are float32,
    `zero_point` [1], the code of 0, is an int32 in -128..127, `bias` is [N]. Raises ValueError naming what does not fit.
    """
    return _operation(x, weight, weight_scale, activation_scale, zero_point, bias, weight_bits, activation_bits)


def _check(x: Tensor, *rest: Any) -> None:
    check_quantized(linear_depth(x), *rest)


_operation = define_op(__name__, quantized_linear_reference, like_rows, on_cpu="cpu_kernel", check=_check)
