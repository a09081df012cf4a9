"""How the windows of a convolution lie in its input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Height and width after the convolution."""
    return [(size[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]


def empty_output(
    x: Tensor,
    weight: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The form of what `x` [B, C, H, W] convolved with `weight` [O, ...] gives: [B, O, H', W']."""
    size = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    return x.new_empty((x.shape[0], weight.shape[0], *size))


def memory_format(x: Tensor) -> torch.memory_format:
    """How a convolution of codes leaves its images: as it computes them on a CPU, as norms of GPUs read them on those."""
    return torch.channels_last if x.device.type == "cpu" else torch.contiguous_format


def windows(
    codes: Tensor,
    zero: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Codes [B, C, H, W], padded with the code `zero`, to one row per output position: [B*H'*W', kh*kw*C].

    Channels come last because they can then be copied in runs: three times faster than windows in the order of the weight.
    """
    margins = (0, 0, padding[1], padding[1], padding[0], padding[0])
    padded = F.pad(codes.permute(0, 2, 3, 1), margins, value=zero).contiguous()
    reach = [dilation[i] * (kernel_size[i] - 1) + 1 for i in (0, 1)]
    found = padded.unfold(1, reach[0], stride[0]).unfold(2, reach[1], stride[1])
    found = found[..., :: dilation[0], :: dilation[1]].permute(0, 1, 2, 4, 5, 3)
    return found.reshape(found.shape[:3].numel(), found.shape[3:].numel())
