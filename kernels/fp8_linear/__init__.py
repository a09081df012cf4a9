"""Linear layer on float8 weights and float8 activations."""

from __future__ import annotations

from torch import Tensor

from ..checks import check_fp8, linear_depth
from ..library import define_op, like_rows
from .reference import fp8_linear_reference

__all__ = ["fp8_linear"]


def fp8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, activation_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """`x` [..., K] times float8 weights: [..., N] in the dtype of `x`.

    `weight` is float8_e4m3fn [N, K]; `weight_scale` [N] and `activation_scale` [1], or one a row of `x`, are float32,
    `bias` is [N]. Raises ValueError naming the argument that does not fit.
    """
    return _operation(x, weight, weight_scale, activation_scale, bias)


def _check(x: Tensor, weight: Tensor, weight_scale: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    check_fp8(linear_depth(x), weight, weight_scale, scale, bias, x.shape[:-1])


_operation = define_op(__name__, fp8_linear_reference, like_rows, check=_check)
