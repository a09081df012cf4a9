"""What every quantized operation asks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

STORED = {8: torch.int8, 4: torch.uint8}
"""How weights of so many bits are stored."""


def check_packed(
    depth: int,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    activation_bits: int,
) -> None:
    """Raises ValueError naming the first argument that does not fit products of `depth` terms."""
    if weight_bits not in STORED:
        raise ValueError(f"weight_bits must be 4 or 8, got {weight_bits}")
    if not 2 <= activation_bits <= 8:
        raise ValueError(f"activation_bits must lie in 2..8, got {activation_bits}")
    columns = depth if weight_bits == 8 else (depth + 1) // 2
    if weight.ndim != 2 or (weight.dtype, weight.shape[1]) != (STORED[weight_bits], columns):
        _refuse("weight", f"{STORED[weight_bits]} [N, {columns}] at {weight_bits} bits", weight)
    if weight_scale.dtype != torch.float32 or weight_scale.shape != weight.shape[:1]:
        _refuse("weight_scale", f"torch.float32 [{len(weight)}]", weight_scale)
    if activation_scale.dtype != torch.float32 or activation_scale.shape != (1,):
        _refuse("activation_scale", "torch.float32 [1]", activation_scale)
    if bias is not None and (not bias.is_floating_point() or bias.shape != weight.shape[:1]):
        _refuse("bias", f"floating point [{len(weight)}]", bias)


def _refuse(name: str, wanted: str, given: Tensor) -> None:
    raise ValueError(f"{name} must be {wanted}, got {given.dtype} {list(given.shape)}")
