"""weight_only_conv2d against the same layer in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffpress.kernels import code_range, pack_codes, unpack_codes, weight_only_conv2d
from diffpress.kernels.processor import fast_dtype


class Case(NamedTuple):
    """One geometry; pairs are height and width."""

    x: tuple[int, int, int, int]
    channels: int
    group_size: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    @property
    def depth(self) -> int:
        return self.x[1] * self.kernel[0] * self.kernel[1]


CASES = [
    Case((1, 1, 1, 1), 1, 1, (1, 1), padding=(0, 0)),
    Case((2, 63, 5, 7), 33, 64),
    Case((1, 100, 9, 4), 63, 16, (1, 1), padding=(0, 0)),
    Case((3, 5, 8, 8), 7, 45, stride=(2, 2)),
    # Groups that end in the middle of a kernel.
    Case((1, 4, 11, 12), 6, 7, padding=(2, 3), dilation=(2, 3)),
    Case((2, 3, 9, 7), 5, 100, (5, 2), (2, 1), (1, 0), (1, 2)),
]
WIDTHS = [2, 3, 4, 8]
Arguments = tuple[Any, ...]


def arguments(case: Case, bits: int, dtype: torch.dtype, bias: bool = True) -> Arguments:
    """Weights that use every code, with scales that differ from group to group."""
    generator = torch.Generator().manual_seed(sum(case.x) + case.channels + bits)
    low, high = code_range(bits)
    codes = torch.randint(low, high + 1, (case.channels, case.depth), dtype=torch.int8, generator=generator)
    groups = -(-case.depth // case.group_size)
    scale = (torch.rand(case.channels, groups, generator=generator) + 0.5) / high / case.depth**0.5
    x = torch.randn(case.x, generator=generator).to(dtype)
    offset = torch.randn(case.channels, generator=generator).to(dtype) if bias else None
    return x, pack_codes(codes, bits), scale, offset, *case[3:], bits, case.group_size


def dequantized(case: Case, given: Arguments) -> Tensor:
    """The kernel [O, C, kh, kw] in float64, column by column."""
    _, weight, scale, *_, bits, group_size = given
    codes = unpack_codes(weight, case.depth, bits).double()
    columns = [codes[:, k] * scale[:, k // group_size] for k in range(case.depth)]
    return torch.stack(columns, 1).view(case.channels, case.x[1], *case.kernel)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part).replace(" ", "") for part in case))
def test_matches_float64(case: Case, bits: int, bias: bool) -> None:
    """A weight is rounded once, and a sum of K products and the bias K + 1 times at most, in whatever order."""
    given = arguments(case, bits, torch.float32, bias)
    x, kernel, geometry = given[0].double(), dequantized(case, given), case[4:]
    offset = given[3].double() if bias else torch.zeros(case.channels).double()
    expected = F.conv2d(x, kernel, offset, *geometry)
    output = weight_only_conv2d(*given)
    assert output.shape == expected.shape
    largest = F.conv2d(x.abs(), kernel.abs(), offset.abs(), *geometry)
    roundings = (case.depth + 2) * torch.finfo(torch.float32).eps / 2
    assert torch.all((output.double() - expected).abs() <= roundings * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_a_convolution_of_the_inputs_dtype(dtype: torch.dtype) -> None:
    case = CASES[4]
    x, weight, scale, bias, *rest = given = arguments(case, 3, dtype)
    weights, wide = dequantized(case, given).float().to(dtype), fast_dtype(x)
    expected = F.conv2d(x.to(wide), weights.to(wide), bias.to(wide), *case[4:]).to(dtype)
    # A float32 bias, as a model that keeps its small tensors exact has it, is cast like the weights.
    for offset in (bias, bias.float()):
        assert torch.equal(weight_only_conv2d(x, weight, scale, offset, *rest), expected)


@pytest.mark.parametrize("bits", WIDTHS)
def test_is_a_well_behaved_operation(bits: int) -> None:
    x, *rest = arguments(CASES[5], bits, torch.float32)
    rest[3:7] = [list(pair) for pair in rest[3:7]]
    torch.library.opcheck(torch.ops.diffpress.weight_only_conv2d.default, (x, *rest))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.ones(5, 8, 8), r"x must be floating point \[B, C, H, W\].*\[5, 8, 8\]"),
        (1, torch.zeros(7, 45, dtype=torch.int8), r"weight must be torch.uint8 \[N, 23\] at 4 bits"),
        (2, torch.ones(7, 2), r"weight_scale must be torch.float32 \[7, 1\]"),
        (3, torch.ones(8), r"bias must be floating point \[7\]"),
        (4, (3,), "kernel_size must be two numbers"),
        (7, (9, 9), "reaches beyond x"),
        (8, 5, "weight_bits must be 2, 3, 4 or 8, got 5"),
        (9, -1, "group_size must be at least 1, got -1"),
    ],
)
def test_what_does_not_fit_is_named(position: int, value: object, message: str) -> None:
    given = list(arguments(CASES[3], 4, torch.float32))
    given[position] = value
    with pytest.raises(ValueError, match=message):
        weight_only_conv2d(*given)
