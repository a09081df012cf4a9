"""quantized_linear against the same layer in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffpress.kernels import code_range, pack_int4, quantized_linear, unpack_int4

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


def arguments(
    lead: tuple[int, ...], depth: int, rows: int, weight_bits: int, activation_bits: int, dtype: torch.dtype, bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, int, int]:
    """Inputs of which about one in a hundred is clipped, and weights that use every code."""
    generator = torch.Generator().manual_seed(depth + rows + weight_bits)
    x = torch.randn(*lead, depth, generator=generator).to(dtype)
    low, high = code_range(weight_bits)
    codes = torch.randint(low, high + 1, (rows, depth), dtype=torch.int8, generator=generator)
    scale = (torch.rand(rows, generator=generator) + 0.5) / high / depth**0.5
    activation_scale = torch.tensor([2.5 / code_range(activation_bits)[1]])
    offset = torch.randn(rows, generator=generator).to(dtype) if bias else None
    weight = codes if weight_bits == 8 else pack_int4(codes)
    return x, weight, scale, activation_scale, offset, weight_bits, activation_bits


def truth(
    x: Tensor, weight: Tensor, scale: Tensor, activation_scale: Tensor, bias: Tensor | None, bits: int, input_bits: int
) -> tuple[Tensor, Tensor]:
    """The product and the output, in float64."""
    low, high = code_range(input_bits)
    inputs = (x.float() / activation_scale).round().clamp(low, high).double()
    weights = weight if bits == 8 else unpack_int4(weight, x.shape[-1])
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
@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (8, 4), (4, 4)], ids=lambda bits: f"W{bits[0]}A{bits[1]}")
@pytest.mark.parametrize(("lead", "depth", "rows"), SHAPES)
def test_matches_float64(
    lead: tuple[int, ...], depth: int, rows: int, bits: tuple[int, int], dtype: torch.dtype, bias: bool
) -> None:
    given = arguments(lead, depth, rows, *bits, dtype, bias)
    output = quantized_linear(*given)
    product, expected = truth(*given)
    assert output.dtype == dtype
    assert output.shape == (*lead, rows)
    assert torch.all((output.double() - expected).abs() <= tolerance(product, expected, dtype))


def test_inputs_that_are_not_contiguous() -> None:
    x, *rest = arguments((6, 5), 32, 7, 8, 8, torch.float32, True)
    strided = x.permute(1, 0, 2)
    assert torch.equal(quantized_linear(strided, *rest), quantized_linear(strided.contiguous(), *rest))


@pytest.mark.parametrize("bits", [4, 8])
def test_is_a_well_behaved_operation(bits: int) -> None:
    given = arguments((3, 5), 33, 6, bits, 8, torch.float32, True)
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
        (4, torch.ones(3), r"bias must be floating point \[4\]"),
        (5, 5, "weight_bits must be 4 or 8, got 5"),
        (5, 4, r"weight must be torch.uint8 \[N, 4\] at 4 bits"),
        (6, 16, r"activation_bits must lie in 2\.\.8, got 16"),
    ],
)
def test_what_does_not_fit_is_named(position: int, value: object, message: str) -> None:
    given = list(arguments((2,), 8, 4, 8, 8, torch.float32, True))
    given[position] = value
    with pytest.raises(ValueError, match=message):
        quantized_linear(*given)


@pytest.mark.long
def test_compiles_into_one_graph() -> None:
    given = arguments((5,), 32, 7, 4, 8, torch.float32, True)
    compiled = torch.compile(quantized_linear, fullgraph=True)
    assert torch.equal(compiled(*given), quantized_linear(*given))
