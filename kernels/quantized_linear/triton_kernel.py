"""What computes `quantized_linear` on a GPU: one pass makes the codes, the kernel of `integer_linear` does the rest."""

from __future__ import annotations

from torch import Tensor

from ..integer_linear.triton_kernel import launch as launch_integers
from ..quantize_rows.triton_kernel import quantize_all


def launch(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    activation_bits: int,
) -> Tensor:
    """Compute `quantized_linear` on the device of its arguments, which are known to fit."""
    codes = quantize_all(x, activation_scale, zero_point, activation_bits)
    return launch_integers(
        codes, weight, weight_scale, activation_scale, zero_point, bias, None, weight_bits, 0, "none", x.dtype
    )
