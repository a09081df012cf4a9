"""fp8_conv2d against the same layer in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from diffpress.kernels import fp8_conv2d


class Case(NamedTuple):
    """One geometry; pairs are height and width."""

    x: tuple[int, int, int, int]
    channels: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    @property
    def depth(self) -> int:
        return self.x[1] * self.kernel[0] * self.kernel[1]


CASES = [
    Case((1, 1, 1, 1), 1, (1, 1), padding=(0, 0)),
    Case((2, 63, 5, 7), 33),
    Case((1, 100, 9, 4), 63, (1, 1), padding=(0, 0)),
    Case((3, 5, 8, 8), 7, stride=(2, 2)),
    Case((1, 4, 11, 12), 6, padding=(2, 3), dilation=(2, 3)),
    Case((2, 3, 9, 7), 5, (5, 2), (2, 1), (1, 0), (1, 2)),
]
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
"""Without test_schema, which compares arguments before and after in arithmetic that float8 has not."""
Arguments = tuple[Any, ...]


def arguments(case: Case, dtype: torch.dtype, bias: bool = True) -> Arguments:
    """Inputs of which about one in a hundred is clipped."""
    generator = torch.Generator().manual_seed(sum(case.x) + case.channels)
    x = torch.randn(case.x, generator=generator).to(dtype)
    weight = torch.randn(case.channels, case.depth, generator=generator).mul(100).to(torch.float8_e4m3fn)
    scale = (torch.rand(case.channels, generator=generator) + 0.5) / 100 / case.depth**0.5
    offset = torch.randn(case.channels, generator=generator).to(dtype) if bias else None
    return x, weight, scale, torch.tensor([2.5 / 448]), offset, *case[2:]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part).replace(" ", "") for part in case))
def test_matches_float64(case: Case, dtype: torch.dtype, bias: bool) -> None:
    """Products of float8 are exact; a sum of K is rounded K - 1 times, scales and bias add three, `dtype` one of its own."""
    x, weight, scale, activation_scale, offset, *_ = given = arguments(case, dtype, bias)
    codes = (x.float() / activation_scale).clamp(-448, 448).to(torch.float8_e4m3fn).double()
    kernel = weight.double().view(case.channels, case.x[1], *case.kernel)
    scales = (activation_scale.double() * scale.double()).view(-1, 1, 1)
    added = torch.zeros(1).double() if offset is None else offset.double().view(-1, 1, 1)
    expected = F.conv2d(codes, kernel, None, *case[3:]) * scales + added
    largest = F.conv2d(codes.abs(), kernel.abs(), None, *case[3:]) * scales + added.abs()
    output = fp8_conv2d(*given)
    assert output.dtype == dtype
    assert output.shape == expected.shape
    single, final = torch.finfo(torch.float32), torch.finfo(dtype)
    allowed = (case.depth + 2) * single.eps / 2 * largest + final.eps / 2 * expected.abs() + final.tiny * final.eps
    assert torch.all((output.double() - expected).abs() <= allowed)


def test_is_a_well_behaved_operation() -> None:
    x, *rest = arguments(CASES[5], torch.float32)
    rest[4:8] = [list(pair) for pair in rest[4:8]]
    torch.library.opcheck(torch.ops.diffpress.fp8_conv2d.default, (x, *rest), test_utils=CHECKS)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.ones(5, 8, 8), r"x must be floating point \[B, C, H, W\].*\[5, 8, 8\]"),
        (1, torch.zeros(7, 45), r"weight must be torch.float8_e4m3fn \[N, 45\], got torch.float32"),
        (2, torch.ones(8), r"weight_scale must be torch.float32 \[7\]"),
        (3, torch.ones(3), r"activation_scale must be torch.float32 \[1\]"),
        (4, torch.ones(8), r"bias must be floating point \[7\]"),
        (7, (1, 1, 1), "padding must be two numbers"),
        (8, (9, 9), "reaches beyond x"),
    ],
)
def test_what_does_not_fit_is_named(position: int, value: object, message: str) -> None:
    given = list(arguments(CASES[3], torch.float32))
    given[position] = value
    with pytest.raises(ValueError, match=message):
        fp8_conv2d(*given)
