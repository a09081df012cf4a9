"""The truth of `quantized_conv2d`, in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..integer_matmul import integer_matmul
from ..packing import unpack_int4
from ..quantization import quantize


def quantized_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    weight_bits: int,
    activation_bits: int,
) -> Tensor:
    """y = s_x s_w (Q(x) * W) + b, the products of each window summed in int32 (see `quantized_conv2d` for the shapes)."""
    height, width = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    windows = _windows(quantize(x, activation_scale, activation_bits), kernel_size, stride, padding, dilation)
    weights = weight if weight_bits == 8 else unpack_int4(weight, windows.shape[1])
    weights = weights.view(len(weight), x.shape[1], -1).transpose(1, 2).reshape(len(weight), -1)
    output = integer_matmul(windows, weights).float() * (activation_scale * weight_scale)
    if bias is not None:
        output = output + bias.float()
    return output.view(x.shape[0], height, width, len(weight)).permute(0, 3, 1, 2).contiguous().to(x.dtype)


def output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Height and width after the convolution."""
    return [(size[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]


def _windows(
    codes: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Codes [B, C, H, W] to one row per output position: [B*H'*W', kh*kw*C].

    Channels come last because they can then be copied in runs: three times faster than windows in the order of the weight.
    """
    padded = F.pad(codes.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0])).contiguous()
    reach = [dilation[i] * (kernel_size[i] - 1) + 1 for i in (0, 1)]
    windows = padded.unfold(1, reach[0], stride[0]).unfold(2, reach[1], stride[1])
    windows = windows[..., :: dilation[0], :: dilation[1]].permute(0, 1, 2, 4, 5, 3)
    return windows.reshape(windows.shape[:3].numel(), windows.shape[3:].numel())
