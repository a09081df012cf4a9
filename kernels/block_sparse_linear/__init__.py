"""Linear layer on a weight of which only some square blocks are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_block_sparse
from ..library import define_op
from .pack import pack_blocks
from .reference import block_sparse_linear_reference

__all__ = ["block_sparse_linear", "pack_blocks"]


def block_sparse_linear(
    x: Tensor,
    values: Tensor,
    column_index: Tensor,
    row_pointer: Tensor,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    outputs: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`x` [..., K] times the weight of `outputs` N rows whose blocks `pack_blocks` made: [..., N] in `dtype`.

    Both floating point, without scales; or both int8 with float32 `weight_scale` [N] and `activation_scale` [1], or one a
    row of `x`. `bias` is [N]. Raises ValueError naming what does not fit; what the indices point at is not looked into.
    """
    check_block_sparse(x, values, column_index, row_pointer, weight_scale, activation_scale, bias, outputs, dtype)
    return torch.ops.diffpress.block_sparse_linear(
        x, values, column_index, row_pointer, weight_scale, activation_scale, bias, outputs, dtype
    )


def _fake(x: Tensor, *rest: object) -> Tensor:
    outputs, dtype = rest[-2:]
    assert isinstance(outputs, int | torch.SymInt)
    assert isinstance(dtype, torch.dtype)
    return x.new_empty((*x.shape[:-1], outputs), dtype=dtype)


define_op(__name__, block_sparse_linear_reference, _fake)
