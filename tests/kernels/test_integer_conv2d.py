"""integer_conv2d, its reference and its Triton kernel, against the same convolution in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffpress.kernels import code_range, integer_conv2d, pack_codes
from diffpress.kernels.integer_conv2d.triton_kernel import launch

pytestmark = pytest.mark.usefixtures("poisoned")


class Case(NamedTuple):
    """One geometry, a format, and what follows the product; pairs are height and width."""

    codes: tuple[int, int, int, int]
    channels: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    bits: int = 8
    zero: int | None = None
    activation: str = "none"
    dtype: torch.dtype = torch.float32


CASES = [
    Case((1, 1, 1, 1), 1, (1, 1), padding=(0, 0)),
    Case((1, 1, 1, 1), 1, zero=127),
    Case((2, 5, 7, 63), 33, zero=-128, activation="silu"),
    Case((1, 9, 4, 100), 63, (1, 1), padding=(0, 0), bits=4, dtype=torch.float16),
    Case((3, 8, 8, 5), 7, stride=(2, 2), bits=3, zero=5),
    Case((1, 9, 10, 3), 4, stride=(2, 3), padding=(0, 1), bits=2),
    Case((1, 11, 12, 4), 6, padding=(2, 3), dilation=(2, 3), bits=4, zero=-7),
    Case((2, 7, 9, 3), 5, (1, 7), padding=(0, 3), dtype=torch.bfloat16),
    Case((2, 9, 7, 3), 5, (5, 2), (2, 1), (1, 0), (1, 2), activation="silu", dtype=torch.float16),
    Case((1, 16, 16, 64), 130, zero=3),
    Case((1, 3, 3, 1000), 10, (2, 2)),
]


def arguments(case: Case) -> dict[str, Any]:
    """Codes that use their whole range, with every optional argument but a zero point."""
    generator = torch.Generator().manual_seed(sum(case.codes) + case.channels)
    low, high = code_range(case.bits)
    depth = case.codes[3] * case.kernel[0] * case.kernel[1]
    reach = [case.dilation[i] * (case.kernel[i] - 1) + 1 for i in (0, 1)]
    size = [(case.codes[1 + i] + 2 * case.padding[i] - reach[i]) // case.stride[i] + 1 for i in (0, 1)]
    return {
        "codes": torch.randint(-128, 128, case.codes, dtype=torch.int8, generator=generator),
        "weight": torch.randint(low, high + 1, (case.channels, depth), dtype=torch.int8, generator=generator),
        "weight_scale": (torch.rand(case.channels, generator=generator) + 0.5) / high / depth**0.5,
        "activation_scale": torch.tensor([0.7 / 128]),
        "zero_point": None if case.zero is None else torch.tensor([case.zero], dtype=torch.int32),
        "bias": torch.randn(case.channels, generator=generator).to(case.dtype),
        "residual": torch.randn(case.codes[0], *size, case.channels, generator=generator).to(case.dtype),
    }


def options(case: Case) -> dict[str, Any]:
    geometry = dict(zip(("kernel_size", "stride", "padding", "dilation"), map(list, case[2:6]), strict=True))
    return {**geometry, "weight_bits": case.bits, "activation": case.activation, "dtype": case.dtype}


def packed(case: Case) -> dict[str, Any]:
    given = arguments(case)
    return {**given, "weight": pack_codes(given["weight"], case.bits)}


def truth(given: dict[str, Any], case: Case) -> tuple[Tensor, Tensor]:
    """The output in float64, and the magnitudes of what is added up in it: exact sums of integers count as one."""
    inputs = given["codes"].double().permute(0, 3, 1, 2) - (case.zero or 0)
    kernel = given["weight"].double().view(case.channels, case.codes[3], *case.kernel)
    sums = F.conv2d(inputs, kernel, None, case.stride, case.padding, case.dilation).permute(0, 2, 3, 1)
    product = sums * given["activation_scale"].double() * given["weight_scale"].double()
    bias, residual = given["bias"].double(), given["residual"].double()
    value = product + bias
    value = F.silu(value) if case.activation == "silu" else value
    return value + residual, product.abs() + bias.abs() + residual.abs()


def tolerance(expected: Tensor, magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit of float32 for the sum, two scales, bias, residual and an activation of ten operations, slope 1.1.

    Then one rounding to `dtype`; Triton's interpreter cuts bfloat16 off instead of rounding it.
    """
    rounding = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)
    return magnitude * 16 * 2.0**-24 + expected.abs() * rounding


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_it_computes_the_convolution(implementation: str, case: Case) -> None:
    expected, magnitude = truth(arguments(case), case)
    given, rest = packed(case), options(case)
    output = (
        integer_conv2d(**given, **rest) if implementation == "reference" else launch(*given.values(), *rest.values())
    )
    assert (output.shape, output.dtype) == (expected.shape, case.dtype)
    assert ((output.double() - expected).abs() <= tolerance(expected, magnitude, case.dtype)).all()


def test_without_what_is_optional_and_with_codes_in_any_order() -> None:
    case = Case((2, 6, 6, 10), 5)
    given = {**packed(case), "bias": None, "residual": None}
    scattered = {**given, "codes": given["codes"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)}
    output = launch(*scattered.values(), *options(case).values())
    assert torch.equal(output, launch(*given.values(), *options(case).values()))
    assert torch.allclose(output, integer_conv2d(**given, **options(case)), rtol=4 * 2.0**-24, atol=0)


def test_no_pictures_give_no_pictures() -> None:
    given = packed(CASES[4])
    for name in ("codes", "residual"):
        given[name] = given[name][:0]
    assert launch(*given.values(), *options(CASES[4]).values()).shape == (0, 4, 4, 7)
    assert integer_conv2d(**given, **options(CASES[4])).shape == (0, 4, 4, 7)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("codes", torch.zeros(3, 8, 8, 5), r"codes must be torch.int8 \[B, H, W, C\]"),
        ("weight", torch.zeros(7, 44, dtype=torch.int8), r"weight must be torch.uint8 \[N, 17\] at 3 bits"),
        ("weight_scale", torch.ones(8), r"weight_scale must be torch.float32 \[7\]"),
        ("activation_scale", torch.ones(3), r"activation_scale must be torch.float32 \[1\]"),
        ("zero_point", torch.ones(1), r"zero_point must be torch.int32 \[1\]"),
        ("bias", torch.ones(3), r"bias must be floating point \[7\]"),
        ("residual", torch.ones(3, 7, 4, 4), r"residual must be floating point \[3, 4, 4, 7\]"),
        ("kernel_size", (3,), "kernel_size must be two numbers, each at least 1"),
        ("kernel_size", (11, 3), "reaches beyond codes"),
        ("stride", (0, 1), "stride must be two numbers, each at least 1"),
        ("padding", (1, -1), "padding must be two numbers, each at least 0"),
        ("dilation", (1, 1, 1), "dilation must be two numbers"),
        ("weight_bits", 5, "weight_bits must be 2, 3, 4 or 8"),
        ("activation", "geglu", "activation must be one of none, silu"),
        ("dtype", torch.int8, "dtype must be floating point"),
    ],
)
def test_what_does_not_fit_is_named(name: str, value: Any, words: str) -> None:
    given = {**packed(CASES[4]), **options(CASES[4]), name: value}
    with pytest.raises(ValueError, match=words):
        integer_conv2d(**given)


def test_torch_compile_and_export_see_one_op() -> None:
    operation = torch.ops.diffpress.integer_conv2d.default
    for case in (CASES[4], CASES[8]):
        torch.library.opcheck(operation, (*packed(case).values(), *options(case).values()))
