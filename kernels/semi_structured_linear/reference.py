"""The truth of `semi_structured_linear`, in torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .pack import unpack_semi_structured


def semi_structured_linear_reference(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W + b on the weight with its zeros (see `semi_structured_linear` for the shapes)."""
    return F.linear(x, unpack_semi_structured(values, positions), None if bias is None else bias.to(x.dtype))
