"""fp8_linear against the same layer in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffpress.kernels import fp8_linear

SHAPES = [((1,), 1, 1), ((63,), 63, 100), ((2, 7), 100, 33), ((), 17, 9), ((0,), 8, 4), ((5,), 1000, 6)]
"""Leading sizes, K, N."""
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
    x, weight, scale, activation_scale, offset = given = arguments(lead, depth, rows, dtype, bias)
    codes = (x.float() / activation_scale).clamp(-448, 448).to(torch.float8_e4m3fn).double()
    scales, weights = activation_scale.double() * scale.double(), weight.double().t()
    added = torch.zeros(rows).double() if offset is None else offset.double()
    expected, largest = codes @ weights * scales + added, codes.abs() @ weights.abs() * scales + added.abs()
    output = fp8_linear(*given)
    assert output.dtype == dtype
    assert output.shape == (*lead, rows)
    single, final = torch.finfo(torch.float32), torch.finfo(dtype)
    allowed = (depth + 2) * single.eps / 2 * largest + final.eps / 2 * expected.abs() + final.tiny * final.eps
    assert torch.all((output.double() - expected).abs() <= allowed)


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
        (4, torch.ones(3), r"bias must be floating point \[4\]"),
    ],
)
def test_what_does_not_fit_is_named(position: int, value: object, message: str) -> None:
    given = list(arguments((2,), 8, 4, torch.float32))
    given[position] = value
    with pytest.raises(ValueError, match=message):
        fp8_linear(*given)
