"""quantized_linear against the same layer in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from diffpress.kernels import code_range, pack_codes, quantized_linear, unpack_codes
from diffpress.kernels.quantized_linear.triton_kernel import launch

SHAPES = [
    ((1,), 1, 1),
    ((5,), 1, 6),
    ((63,), 63, 100),
    ((100,), 1000, 63),
    ((2, 7), 100, 33),
    ((3, 1, 5), 64, 8),
    ((), 17, 9),
    ((0,), 8, 4),
]
"""Leading sizes, K, N."""
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


def arguments(
    lead: tuple[int, ...], depth: int, rows: int, form: Format, dtype: torch.dtype, bias: bool = True
) -> Arguments:
    """Inputs of which some are clipped, and weights that use every code."""
    generator = torch.Generator().manual_seed(depth + rows + form.weight_bits)
    x = torch.randn(*lead, depth, generator=generator).to(dtype)
    low, high = code_range(form.weight_bits)
    codes = torch.randint(low, high + 1, (rows, depth), dtype=torch.int8, generator=generator)
    scale = (torch.rand(rows, generator=generator) + 0.5) / high / depth**0.5
    activation_scale = torch.tensor([2.5 / code_range(form.activation_bits)[1]])
    zero_point = None if form.zero is None else torch.tensor([form.zero], dtype=torch.int32)
    offset = torch.randn(rows, generator=generator).to(dtype) if bias else None
    return x, pack_codes(codes, form.weight_bits), scale, activation_scale, zero_point, offset, *form[:2]


def truth(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    activation_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    input_bits: int,
) -> tuple[Tensor, Tensor]:
    """The product and the output, in float64."""
    low, high = code_range(input_bits)
    zero = 0 if zero_point is None else int(zero_point)
    inputs = ((x.float() / activation_scale).round() + zero).clamp(low, high).double() - zero
    weights = unpack_codes(weight, x.shape[-1], bits)
    product = inputs @ weights.double().t() * activation_scale.double() * scale.double()
    return product, product if bias is None else product + bias.double()


def tolerance(product: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
    """Four roundings in float32 (the sum, the two scales, their product with it, the bias) and one to `dtype`.

    The sum over K is exact in integers, so K does not enter but through the size of the product.
    """
    single, final = torch.finfo(torch.float32), torch.finfo(dtype)
    return 2 * single.eps * (product.abs() + output.abs()) + final.eps / 2 * output.abs() + final.tiny * final.eps


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: "W{}A{} zero {}".format(*form))
@pytest.mark.parametrize(("lead", "depth", "rows"), SHAPES)
def test_matches_float64(
    lead: tuple[int, ...], depth: int, rows: int, form: Format, dtype: torch.dtype, bias: bool
) -> None:
    given = arguments(lead, depth, rows, form, dtype, bias)
    output = quantized_linear(*given)
    product, expected = truth(*given)
    assert output.dtype == dtype
    assert output.shape == (*lead, rows)
    assert torch.all((output.double() - expected).abs() <= tolerance(product, expected, dtype))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("form", [Format(8, 8), Format(4, 4, -6), Format(3, 6)])
@pytest.mark.parametrize(("lead", "depth", "rows"), [((1,), 1, 1), ((63,), 100, 20), ((2, 7), 63, 33), ((0,), 8, 4)])
def test_the_kernel_matches_float64(lead: tuple[int, ...], depth: int, rows: int, form: Format) -> None:
    given = arguments(lead, depth, rows, form, torch.float16)
    output = launch(*given)
    product, expected = truth(*given)
    assert (output.dtype, output.shape) == (torch.float16, (*lead, rows))
    assert torch.all((output.double() - expected).abs() <= tolerance(product, expected, torch.float16))


def test_inputs_that_are_not_contiguous() -> None:
    x, *rest = arguments((6, 5), 32, 7, Format(8, 8), torch.float32)
    strided = x.permute(1, 0, 2)
    assert torch.equal(quantized_linear(strided, *rest), quantized_linear(strided.contiguous(), *rest))


def test_a_zero_point_of_0_is_none() -> None:
    with_zero, without = (arguments((9,), 32, 7, Format(4, 8, zero), torch.float32) for zero in (0, None))
    assert torch.equal(quantized_linear(*with_zero), quantized_linear(*without))


@pytest.mark.parametrize("form", [Format(2, 8), Format(3, 8, 5), Format(4, 8), Format(8, 8)])
def test_is_a_well_behaved_operation(form: Format) -> None:
    given = arguments((3, 5), 33, 6, form, torch.float32)
    torch.library.opcheck(torch.ops.diffpress.quantized_linear.default, given)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.ones(2, 8, dtype=torch.int8), r"x must be floating point \[..., K\].*int8"),
        (
            1,
            torch.zeros(4, 7, dtype=torch.int8),
            r"weight must be torch.int8 \[N, 8\] at 8 bits, got torch.int8 \[4, 7\]",
        ),
        (1, torch.zeros(4, 8), "weight must be torch.int8.*got torch.float32"),
        (1, torch.zeros(4, 4, dtype=torch.uint8), "weight must be torch.int8.*got torch.uint8"),
        (2, torch.ones(3), r"weight_scale must be torch.float32 \[4\], got torch.float32 \[3\]"),
        (2, torch.ones(4, dtype=torch.float16), "weight_scale must be torch.float32.*got torch.float16"),
        (3, torch.ones(4), r"activation_scale must be torch.float32 \[1\]"),
        (3, torch.ones(1, dtype=torch.bfloat16), "activation_scale must be torch.float32.*got torch.bfloat16"),
        (4, torch.ones(1), r"zero_point must be torch.int32 \[1\], got torch.float32"),
        (4, torch.ones(2, dtype=torch.int32), r"zero_point must be torch.int32 \[1\], got torch.int32 \[2\]"),
        (5, torch.ones(3), r"bias must be floating point \[4\]"),
        (6, 5, "weight_bits must be 2, 3, 4 or 8, got 5"),
        (6, 4, r"weight must be torch.uint8 \[N, 4\] at 4 bits"),
        (6, 3, r"weight must be torch.uint8 \[N, 3\] at 3 bits"),
        (7, 16, r"activation_bits must lie in 2\.\.8, got 16"),
    ],
)
def test_what_does_not_fit_is_named(position: int, value: object, message: str) -> None:
    given = list(arguments((2,), 8, 4, Format(8, 8, 3), torch.float32))
    given[position] = value
    with pytest.raises(ValueError, match=message):
        quantized_linear(*given)


@pytest.mark.long
def test_compiles_into_one_graph() -> None:
    given = arguments((5,), 32, 7, Format(4, 8, 3), torch.float32)
    compiled = torch.compile(quantized_linear, fullgraph=True)
    assert torch.equal(compiled(*given), quantized_linear(*given))
