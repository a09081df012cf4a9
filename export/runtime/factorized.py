"""A Linear of low rank, as it is stored: two smaller ones after each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .exact import ExactTensors


class BufferedLinear(nn.Linear):
    """A Linear of float32 whose tensors are buffers: pipelines ask the parameters of a model what to compute in."""

    weight: Tensor
    bias: Tensor | None  # type: ignore[assignment]

    def __init__(self, columns: int, rows: int, has_bias: bool) -> None:
        """[..., columns] to [..., rows], all zero."""
        # Not Linear's own: it draws weights from torch's global generator.
        nn.Module.__init__(self)
        self.in_features, self.out_features = columns, rows
        self.register_buffer("weight", torch.zeros(rows, columns, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(rows, dtype=torch.float32) if has_bias else None)


class FactorizedLinear(ExactTensors):
    """[..., in] to [..., out] by way of `rank` numbers: computed in the dtype of its bias, answered in that of the input."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        """The empty form of `layer`."""
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.down = BufferedLinear(layer.in_features, rank, False)
        self.up = BufferedLinear(rank, layer.out_features, True)

    def exact_tensors(self) -> tuple[str, ...]:
        """Those of both, packed or not."""
        return "down.weight", "up.weight", "up.bias"

    def forward(self, x: Tensor) -> Tensor:
        assert self.up.bias is not None
        return self.up(self.down(x.to(self.up.bias.dtype))).to(x.dtype)


def factorize_layer(layer: nn.Module, rank: int) -> FactorizedLinear:
    """The empty form of `layer` with that rank. Raises ValueError where it has none that is smaller."""
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{type(layer).__name__} is no Linear, which two could stand for")
    if rank > min(layer.in_features, layer.out_features):
        raise ValueError(f"rank {rank} is more than a weight of {layer.out_features} x {layer.in_features} can have")
    return FactorizedLinear(layer, rank)
