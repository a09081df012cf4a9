"""Linear layer on integer weights with a live low-rank branch beside them: an adapter that acts after compression."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_branch, check_weight_only, linear_depth
from ..library import define_op, like_rows
from .reference import lora_linear_reference

__all__ = ["lora_linear"]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    branch_scale: float,
    weight_bits: int,
    group_size: int,
) -> Tensor:
    """`x` [..., K] times integer weights, plus (x down^T) up^T * `branch_scale`: [..., N], computed in the dtype of `x`.

    `down` [R, K] and `up` [N, R] are floating point, R at most 128; the other arguments are those of `weight_only_linear`.
    Raises ValueError naming what does not fit.
    """
    depth = linear_depth(x)
    check_weight_only(depth, weight, weight_scale, bias, weight_bits, group_size)
    check_branch(depth, len(weight), down, up)
    return torch.ops.diffpress.lora_linear(
        x, weight, weight_scale, down, up, bias, branch_scale, weight_bits, group_size
    )


define_op(__name__, lora_linear_reference, like_rows)
