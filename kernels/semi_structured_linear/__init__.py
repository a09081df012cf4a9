"""Linear layer on a weight of which every four neighbouring columns keep two: 2:4 sparsity."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_semi_structured, linear_depth
from ..library import define_op, like_rows
from .pack import pack_semi_structured
from .reference import semi_structured_linear_reference

__all__ = ["pack_semi_structured", "semi_structured_linear"]


def semi_structured_linear(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` [..., K] times a 2:4 sparse weight: [..., N], computed in the dtype of `x`.

    `values` [N, K / 2] in that dtype and uint8 `positions` [N, ceil(K / 8)] are those of `pack_semi_structured`, `bias` is
    [N]. Raises ValueError naming what does not fit.
    """
    check_semi_structured(linear_depth(x), x.dtype, values, positions, bias)
    return torch.ops.diffpress.semi_structured_linear(x, values, positions, bias)


define_op(__name__, semi_structured_linear_reference, like_rows, on_gpu="cusparselt")
