"""quantized_conv2d against the same layer in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffpress.kernels import code_range, pack_codes, quantized_conv2d, unpack_codes


class Case(NamedTuple):
    """One geometry; pairs are height and width."""

    x: tuple[int, int, int, int]
    channels: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)


CASES = [
    Case((1, 1, 1, 1), 1, (1, 1), padding=(0, 0)),
    Case((2, 1, 4, 4), 6, (1, 1), padding=(0, 0)),
    Case((1, 1, 1, 1), 1),
    Case((2, 63, 5, 7), 33),
    Case((1, 100, 9, 4), 63, (1, 1), padding=(0, 0)),
    Case((3, 5, 8, 8), 7, stride=(2, 2)),
    Case((1, 3, 9, 10), 4, stride=(2, 3), padding=(0, 1)),
    Case((1, 4, 11, 12), 6, padding=(2, 3), dilation=(2, 3)),
    Case((2, 3, 7, 9), 5, (1, 7), padding=(0, 3)),
    Case((2, 3, 9, 7), 5, (5, 2), (2, 1), (1, 0), (1, 2)),
    Case((1, 8, 16, 16), 3, (4, 4), (4, 4), (0, 0)),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Format(NamedTuple):
    """Bits of weights and activations, and the code of 0."""

    weight_bits: int
    activation_bits: int
    zero: int | None = None


FORMATS = [
    Format(8, 8),
    Format(4, 8),
    Format(8, 4),
    Format(4, 4),
    Format(3, 6),
    Format(2, 8),
    Format(8, 8, -100),
    Format(4, 4, -6),
    Format(3, 2, 1),
]
Arguments = tuple[Any, ...]


def arguments(case: Case, form: Format, dtype: torch.dtype, bias: bool = True) -> Arguments:
    """Inputs of which some are clipped, and weights that use every code."""
    generator = torch.Generator().manual_seed(sum(case.x) + case.channels + form.weight_bits)
    x = torch.randn(case.x, generator=generator).to(dtype)
    low, high = code_range(form.weight_bits)
    depth = case.x[1] * case.kernel[0] * case.kernel[1]
    codes = torch.randint(low, high + 1, (case.channels, depth), dtype=torch.int8, generator=generator)
    scale = (torch.rand(case.channels, generator=generator) + 0.5) / high / depth**0.5
    activation_scale = torch.tensor([2.5 / code_range(form.activation_bits)[1]])
    zero_point = None if form.zero is None else torch.tensor([form.zero], dtype=torch.int32)
    offset = torch.randn(case.channels, generator=generator).to(dtype) if bias else None
    weight = pack_codes(codes, form.weight_bits)
    return x, weight, scale, activation_scale, zero_point, offset, *case[2:], *form[:2]


def truth(case: Case, given: Arguments) -> tuple[Tensor, Tensor]:
    """The product and the output, in float64; the padding is zeros."""
    x, weight, scale, activation_scale, zero_point, bias, *_, weight_bits, activation_bits = given
    low, high = code_range(activation_bits)
    zero = 0 if zero_point is None else int(zero_point)
    inputs = ((x.float() / activation_scale).round() + zero).clamp(low, high).double() - zero
    depth = case.x[1] * case.kernel[0] * case.kernel[1]
    kernel = unpack_codes(weight, depth, weight_bits).double().view(case.channels, case.x[1], *case.kernel)
    windows = F.conv2d(inputs, kernel, None, case.stride, case.padding, case.dilation)
    product = windows * activation_scale.double() * scale.double().view(-1, 1, 1)
    return product, product if bias is None else product + bias.double().view(-1, 1, 1)


def tolerance(product: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
    """Four roundings in float32 (the sum, the two scales, their product with it, the bias) and one to `dtype`.

    The sum over a window is exact in integers, so its length does not enter but through the size of the product.
    """
    single, final = torch.finfo(torch.float32), torch.finfo(dtype)
    return 2 * single.eps * (product.abs() + output.abs()) + final.eps / 2 * output.abs() + final.tiny * final.eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: "W{}A{} zero {}".format(*form))
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part).replace(" ", "") for part in case))
def test_matches_float64(case: Case, form: Format, dtype: torch.dtype) -> None:
    given = arguments(case, form, dtype)
    output = quantized_conv2d(*given)
    product, expected = truth(case, given)
    assert output.dtype == dtype
    assert output.shape == expected.shape
    assert torch.all((output.double() - expected).abs() <= tolerance(product, expected, dtype))


def test_without_bias() -> None:
    given = arguments(CASES[2], Format(8, 8), torch.float32, bias=False)
    product, expected = truth(CASES[2], given)
    error = (quantized_conv2d(*given).double() - expected).abs()
    assert torch.all(error <= tolerance(product, expected, torch.float32))


@pytest.mark.parametrize("zero", [-128, 127])
def test_padding_is_0_where_the_zero_point_is_an_end_of_the_range(zero: int) -> None:
    x, scale, point = torch.zeros(1, 2, 3, 3), torch.ones(1), torch.tensor([zero], dtype=torch.int32)
    weight = torch.ones(1, 18, dtype=torch.int8)
    output = quantized_conv2d(x, weight, scale, scale, point, None, (3, 3), (1, 1), (2, 2), (1, 1), 8, 8)
    assert not output.any()


def test_channels_last_gives_the_same() -> None:
    x, *rest = arguments(CASES[5], Format(4, 8), torch.float32)
    assert torch.equal(quantized_conv2d(x.to(memory_format=torch.channels_last), *rest), quantized_conv2d(x, *rest))


def test_no_pictures_give_no_pictures() -> None:
    x, *rest = arguments(CASES[5], Format(8, 8), torch.float32)
    assert quantized_conv2d(x[:0], *rest).shape == (0, 7, 4, 4)


@pytest.mark.parametrize("form", [Format(2, 8), Format(3, 8, 5), Format(4, 8), Format(8, 8)])
def test_is_a_well_behaved_operation(form: Format) -> None:
    x, *rest = arguments(CASES[9], form, torch.float32)
    rest[5:9] = [list(pair) for pair in rest[5:9]]
    operation = torch.ops.diffpress.quantized_conv2d.default
    torch.library.opcheck(operation, (x, *rest))
    torch.library.opcheck(operation, (x.to(memory_format=torch.channels_last), *rest), test_utils="test_faketensor")


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.ones(5, 8, 8), r"x must be floating point \[B, C, H, W\].*\[5, 8, 8\]"),
        (0, torch.ones(1, 4, 8, 8), r"weight must be torch.int8 \[N, 36\] at 8 bits, got torch.int8 \[7, 45\]"),
        (0, torch.ones(1, 5, 8, 8, dtype=torch.int8), "x must be floating point.*int8"),
        (1, torch.zeros(7, 5, 3, 3, dtype=torch.int8), r"weight must be.*\[7, 5, 3, 3\]"),
        (2, torch.ones(8), r"weight_scale must be torch.float32 \[7\]"),
        (3, torch.ones(2), r"activation_scale must be torch.float32 \[1\]"),
        (4, torch.ones(1), r"zero_point must be torch.int32 \[1\]"),
        (5, torch.ones(8), r"bias must be floating point \[7\]"),
        (6, (3,), "kernel_size must be two numbers"),
        (7, (1, 1, 1), "stride must be two numbers"),
        (8, (1,), "padding must be two numbers"),
        (9, (9, 9), "reaches beyond x"),
        (10, 6, "weight_bits must be 2, 3, 4 or 8, got 6"),
        (11, 1, "activation_bits must lie in"),
    ],
)
def test_what_does_not_fit_is_named(position: int, value: object, message: str) -> None:
    given = list(arguments(CASES[5], Format(8, 8, 3), torch.float32))
    given[position] = value
    with pytest.raises(ValueError, match=message):
        quantized_conv2d(*given)


@pytest.mark.long
def test_compiles_into_one_graph() -> None:
    given = arguments(CASES[5], Format(4, 8, 3), torch.float32)
    compiled = torch.compile(quantized_conv2d, fullgraph=True)
    assert torch.equal(compiled(*given), quantized_conv2d(*given))
