"""The truth of `semi_structured_linear`, in torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..processor import fast_dtype
from .pack import unpack_semi_structured


def semi_structured_linear_reference(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W + b on the weight with its zeros (see `semi_structured_linear`, and `fast_dtype`)."""
    dtype, weight = fast_dtype(x), unpack_semi_structured(values, positions)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(x.dtype).to(dtype)).to(x.dtype)
