"""What computes `semi_structured_linear` on a GPU: cuSPARSELt through torch, there is no Triton kernel of ours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse import to_sparse_semi_structured

from ..kept import kept_with
from .pack import unpack_semi_structured
from .reference import semi_structured_linear_reference

ROWS, COLUMNS = 32, 64
"""What the sides of a weight are multiples of, in all of torch's back ends."""


def launch(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `semi_structured_linear` on the device of its arguments; by the reference where torch has no kernel for it."""
    if not takes(x, values):
        return semi_structured_linear_reference(x, values, positions, bias)
    # Making cuSPARSELt's form takes longer than the product.
    weight = kept_with(
        values, "cuSPARSELt", lambda: to_sparse_semi_structured(unpack_semi_structured(values, positions))
    )
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    y = F.linear(rows, weight, None if bias is None else bias.to(x.dtype))
    return y.contiguous().view(*x.shape[:-1], len(values))


def takes(x: Tensor, values: Tensor) -> bool:
    """Whether torch has a kernel for this product where `x` is."""
    fits = len(values) % ROWS == 0 and x.shape[-1] % COLUMNS == 0 and values.numel() > 0 and x.numel() > 0
    half = x.dtype in (torch.float16, torch.bfloat16)
    return half and fits and x.is_cuda and torch.backends.cusparselt.is_available()
