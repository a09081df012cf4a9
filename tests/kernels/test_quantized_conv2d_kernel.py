"""The Triton kernels of quantized_conv2d against its reference."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from diffpress.kernels import code_range, pack_codes, quantize, quantized_conv2d
from diffpress.kernels.quantized_conv2d.triton_kernel import launch, quantize_pixels

pytestmark = pytest.mark.usefixtures("poisoned")


class Case(NamedTuple):
    """An image, its convolution and its formats."""

    x: tuple[int, int, int, int]
    channels: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    weight_bits: int = 8
    activation_bits: int = 8
    zero: int | None = None
    dtype: torch.dtype = torch.float32
    channels_last: bool = False


CASES = [
    Case((1, 1, 1, 1), 1),
    Case((2, 63, 5, 7), 33, zero=-100, dtype=torch.float16),
    Case((1, 100, 9, 4), 63, (1, 1), padding=(0, 0), weight_bits=4, channels_last=True),
    Case((3, 5, 8, 8), 7, stride=(2, 2), weight_bits=3, activation_bits=6, zero=1, channels_last=True),
    Case((1, 4, 11, 12), 6, padding=(2, 3), dilation=(2, 3), weight_bits=2, dtype=torch.float16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_agrees_with_the_reference(case: Case) -> None:
    generator = torch.Generator().manual_seed(sum(case.x))
    low, high = code_range(case.weight_bits)
    depth = case.x[1] * case.kernel[0] * case.kernel[1]
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    given = (
        torch.randn(case.x, generator=generator).to(case.dtype).contiguous(memory_format=layout),
        pack_codes(
            torch.randint(low, high + 1, (case.channels, depth), dtype=torch.int8, generator=generator),
            case.weight_bits,
        ),
        (torch.rand(case.channels, generator=generator) + 0.5) / high / depth**0.5,
        torch.tensor([2.5 / code_range(case.activation_bits)[1]]),
        None if case.zero is None else torch.tensor([case.zero], dtype=torch.int32),
        torch.randn(case.channels, generator=generator).to(case.dtype),
        *map(list, case[2:6]),
        case.weight_bits,
        case.activation_bits,
    )
    output, expected = launch(*given), quantized_conv2d(*given)
    # The reference has the channels beside each other, as a CPU wants them.
    assert output.is_contiguous()
    assert (output.dtype, output.shape) == (expected.dtype, expected.shape)
    # The same codes, so the same integers; after them four operations of float32 on either side, and one rounding.
    magnitude = expected.double().abs() + 2 * given[5].double().abs().view(-1, 1, 1)
    error = (output.double() - expected.double()).abs()
    assert (error <= 8 * 2.0**-24 * magnitude + torch.finfo(case.dtype).eps * expected.double().abs()).all()


@pytest.mark.parametrize("zero", [None, -7])
def test_codes_lie_with_the_channels_last(zero: int | None) -> None:
    x = torch.randn(2, 70, 9, 8, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([0.02])
    zero_point = None if zero is None else torch.tensor([zero], dtype=torch.int32)
    expected = quantize(x, scale, 8, zero_point).permute(0, 2, 3, 1)
    for layout in (torch.contiguous_format, torch.channels_last):
        codes = quantize_pixels(x.contiguous(memory_format=layout), scale, zero_point, 8)
        assert codes.is_contiguous()
        assert torch.equal(codes, expected)


def test_no_pictures_give_no_pictures() -> None:
    weight = torch.zeros(7, 45, dtype=torch.int8)
    geometry = ([3, 3], [2, 2], [1, 1], [1, 1])
    output = launch(torch.zeros(0, 5, 8, 8), weight, torch.ones(7), torch.ones(1), None, None, *geometry, 8, 8)
    assert output.shape == (0, 7, 4, 4)
