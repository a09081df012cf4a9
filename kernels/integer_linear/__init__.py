"""Linear layer on codes: integer weights, inputs that are integers already, and what follows it in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_integer_linear
from ..library import define_op
from .reference import integer_linear_reference

__all__ = ["integer_linear"]


def integer_linear(
    codes: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    weight_bits: int = 8,
    group_size: int = 0,
    activation: str = "none",
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """act(int8 `codes` [..., K] times integer weights + bias) + residual: [..., N] in `dtype`, half of N for `geglu`.

    `weight` [N, ...] is packed from [N, K] (see `pack_codes`); `weight_scale` is float32 [N], or [N, ceil(K / group_size)]
    for groups of columns; `activation_scale` is float32 [1], or one a row of the codes; `zero_point` [1], the code of 0, is
    an int32; `bias` is [N], `residual` has the form of the output. `activation` is one of ACTIVATIONS. Raises ValueError
    naming what does not fit.
    """
    check_integer_linear(
        codes,
        weight,
        weight_scale,
        activation_scale,
        zero_point,
        bias,
        residual,
        weight_bits,
        group_size,
        activation,
        dtype,
    )
    return torch.ops.diffpress.integer_linear(
        codes,
        weight,
        weight_scale,
        activation_scale,
        zero_point,
        bias,
        residual,
        weight_bits,
        group_size,
        activation,
        dtype,
    )


def _fake(codes: Tensor, weight: Tensor, *rest: object) -> Tensor:
    *_, activation, dtype = rest
    assert isinstance(dtype, torch.dtype)
    columns = weight.shape[0] // (2 if activation == "geglu" else 1)
    return codes.new_empty((*codes.shape[:-1], columns), dtype=dtype)


define_op(__name__, integer_linear_reference, _fake, on_cpu="cpu_kernel")
