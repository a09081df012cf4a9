"""The activations that a linear layer or convolution can end in."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "geglu")
"""`geglu`: the first half of the outputs times the GELU of the second (Shazeer 2020, arXiv 2002.05202)."""


def activate(x: Tensor, activation: str) -> Tensor:
    """One of ACTIVATIONS of float32 `x` [..., N]: [..., N], or [..., N / 2] for geglu."""
    if activation == "geglu":
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)
    if activation == "silu":
        return F.silu(x)
    return x if activation == "none" else F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
