"""Triton kernel of `lora_linear`: that of `weight_only_linear`, which reads few rows of x once for both branches."""

from __future__ import annotations

from torch import Tensor

from ..aot import Form
from ..checks import LARGEST_RANK
from ..weight_only_linear.triton_kernel import (
    FLOAT32_BRANCH_TILES,
    HIGH_RANK_TILES,
    LOW_RANK,
    SMALLER_TILES,
    Branch,
    form,
    launch_beside,
)


def launch(
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
    """Compute `lora_linear` on the device of its arguments, which are known to fit."""
    branch = Branch(down.to(x.dtype).contiguous(), up.to(x.dtype).contiguous(), branch_scale)
    return launch_beside(branch, x, weight, weight_scale, bias, weight_bits, group_size)


def forms() -> list[Form]:
    """What is compiled ahead of time: every tile at the highest rank that it is used for."""
    formats = [(tile, 4, 128, "bf16", LOW_RANK) for tile in SMALLER_TILES]
    formats += [(tile, bits, 100, "fp16", LARGEST_RANK) for tile in HIGH_RANK_TILES for bits in (3, 8)]
    formats += [(tile, 4, 128, "fp32", LARGEST_RANK) for tile in FLOAT32_BRANCH_TILES]
    return [form(*chosen) for chosen in formats]
