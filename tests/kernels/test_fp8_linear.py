"""fp8_linear against the same layer in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffpress.kernels import fp8_linear, to_fp8
from diffpress.kernels.fp8_linear.triton_kernel import launch, to_fp8_rows

SHAPES = [((1,), 1, 1), ((63,), 63, 100), ((2, 7), 100, 33), ((), 17, 9), ((0,), 8, 4), ((5,), 1000, 6)]
"""Leading sizes, K, N."""
KERNEL_SHAPES = [((1,), 1, 1), ((63,), 1000, 100), ((5, 13), 192, 130), ((100,), 63, 64)]
"""The same for the kernel."""
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
"""Without test_schema, which compares arguments before and after in arithmetic that float8 has not."""
Arguments = tuple[Any, ...]


def arguments(lead: tuple[int, ...], depth: int, rows: int, dtype: torch.dtype, bias: bool = True) -> Arguments:
    """Inputs of which about one in a hundred is clipped."""
    generator = torch.Generator().manual_seed(depth + rows)
    x = torch.randn(*lead, depth, generator=generator).to(dtype)
    weight = torch.randn(rows, depth, generator=generator).mul(100).to(torch.float8_e4m3fn)
    scale = (torch.rand(rows, generator=generator) + 0.5) / 100 / depth**0.5
    offset = torch.randn(rows, generator=generator).to(dtype) if bias else None
    return x, weight, scale, torch.tensor([2.5 / 448]), offset


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("lead", "depth", "rows"), SHAPES)
def test_matches_float64(lead: tuple[int, ...], depth: int, rows: int, dtype: torch.dtype, bias: bool) -> None:
    """Products of float8 are exact; a sum of K is rounded K - 1 times, scales and bias add three, `dtype` one of its own."""
    given = arguments(lead, depth, rows, dtype, bias)
    output = fp8_linear(*given)
    assert output.dtype == dtype
    assert output.shape == (*lead, rows)
    expected, allowed = truth(given)
    assert torch.all((output.double() - expected).abs() <= allowed)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", [fp8_linear, launch], ids=["reference", "triton"])
@pytest.mark.parametrize(("lead", "depth", "rows"), KERNEL_SHAPES)
def test_rows_may_have_scales(
    lead: tuple[int, ...], depth: int, rows: int, implementation: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    x, weight, scale, activation_scale, offset = arguments(lead, depth, rows, dtype)
    count = x.shape[:-1].numel()
    for scales in (activation_scale, activation_scale * torch.linspace(0.5, 2, count)):
        given = x, weight, scale, scales, offset
        output = implementation(*given)
        assert (output.dtype, output.shape) == (dtype, (*lead, rows))
        expected, allowed = truth(given)
        assert torch.all((output.double() - expected).abs() <= allowed)


def truth(given: Arguments) -> tuple[Tensor, Tensor]:
    """The output in float64, and how far from it one may be."""
    x, weight, scale, activation_scale, offset = given
    by_row = activation_scale if activation_scale.numel() == 1 else activation_scale.view(*x.shape[:-1], 1)
    codes = (x.float() / by_row).clamp(-448, 448).to(torch.float8_e4m3fn).double()
    scales, weights = by_row.double() * scale.double(), weight.double().t()
    added = torch.zeros(len(weight)).double() if offset is None else offset.double()
    expected, largest = codes @ weights * scales + added, codes.abs() @ weights.abs() * scales + added.abs()
    single, final = torch.finfo(torch.float32), torch.finfo(x.dtype)
    roundings = (x.shape[-1] + 2) * single.eps / 2
    return expected, roundings * largest + final.eps / 2 * expected.abs() + final.tiny * final.eps


def test_is_a_well_behaved_operation() -> None:
    torch.library.opcheck(
        torch.ops.diffpress.fp8_linear.default, arguments((3, 5), 33, 6, torch.float32), test_utils=CHECKS
    )


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.ones(2, 8, dtype=torch.int8), r"x must be floating point \[..., K\].*int8"),
        (1, torch.zeros(4, 8), r"weight must be torch.float8_e4m3fn \[N, 8\], got torch.float32"),
        (1, torch.zeros(4, 7).to(torch.float8_e4m3fn), r"weight must be torch.float8_e4m3fn \[N, 8\].*\[4, 7\]"),
        (2, torch.ones(4, 1), r"weight_scale must be torch.float32 \[4\]"),
        (3, torch.ones(1).half(), r"activation_scale must be torch.float32 \[1\]"),
        (3, torch.ones(3), r"activation_scale must be torch.float32 \[1\] or \[2\]"),
        (4, torch.ones(3), r"bias must be floating point \[4\]"),
    ],
)
def test_what_does_not_fit_is_named(position: int, value: object, message: str) -> None:
    given = list(arguments((2,), 8, 4, torch.float32))
    given[position] = value
    with pytest.raises(ValueError, match=message):
        fp8_linear(*given)


def test_float8_of_rows_is_that_of_torch() -> None:
    x = torch.randn(33, 100, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.linspace(-5, 3, 33)[:, None]
    x[0, :6] = torch.tensor([448.0, 1e6, -1e6, 0.0, 2.0**-10, 3 * 2.0**-10])
    scale = torch.full((33,), 0.5)
    assert torch.equal(to_fp8_rows(x, scale).float(), to_fp8(x, scale[:, None]).float())
