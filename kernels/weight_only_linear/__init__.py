"""Linear layer on integer weights, computed in floats."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..checks import check_weight_only, linear_depth
from ..library import define_op, like_rows
from .reference import weight_only_linear_reference

__all__ = ["weight_only_linear"]


def weight_only_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, weight_bits: int, group_size: int
) -> Tensor:
    """`x` [..., K] times integer weights: [..., N], computed in the dtype of `x`.

    `weight` [N, ...] is packed from [N, K] (see `pack_codes`); `weight_scale` [N, ceil(K / group_size)] is float32, one a
    group of neighbouring columns, the last of which may be short; `bias` is [N]. Raises ValueError naming what does not fit.
    """
    return _operation(x, weight, weight_scale, bias, weight_bits, group_size)


def _check(x: Tensor, *rest: Any) -> None:
    check_weight_only(linear_depth(x), *rest)


_operation = define_op(__name__, weight_only_linear_reference, like_rows, check=_check)
