"""quantize_rows, its reference and its Triton kernel, against `quantize` and against exact rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffpress.kernels import code_range, quantize, quantize_rows
from diffpress.kernels.quantize_rows.triton_kernel import launch

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [(1, 1), (63, 100), (100, 63), (2, 5, 1000), (3, 5000)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IMPLEMENTATIONS = {"reference": quantize_rows, "triton": launch}


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Rows of different sizes, one of them all 0."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * torch.rand(*shape[:-1], 1, generator=generator) * 3
    x.view(-1, shape[-1])[-1] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_given_scale_gives_the_codes_of_quantize(bits: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, scale = values(shape, dtype), torch.tensor([0.37 / 2 ** (bits - 3)])
    zero_point = torch.tensor([-3], dtype=torch.int32)
    codes, scales = launch(x, scale, zero_point, bits)
    assert torch.equal(codes, quantize(x, scale, bits, zero_point))
    assert torch.equal(scales, scale)
    assert all(map(torch.equal, (codes, scales), quantize_rows(x, scale, zero_point, bits)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_found_scales_put_the_largest_magnitude_at_the_largest_code(
    implementation: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = values(shape, dtype)
    codes, scales = IMPLEMENTATIONS[implementation](x, None, None, 8)
    rows, found = x.reshape(-1, shape[-1]).double(), codes.view(-1, shape[-1]).double()
    largest = rows.abs().amax(1)
    assert torch.equal(scales, torch.where(largest == 0, 1, largest.float() / 127))
    assert torch.equal(found.abs().amax(1), torch.where(largest == 0, 0, 127).double())
    # Half a step, and two roundings of float32 in a code: of the scale and of the division.
    assert ((found * scales[:, None].double() - rows).abs() <= scales[:, None] * (0.5 + 127 * 2 * 2.0**-24)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ties_go_to_the_even_code(implementation: str) -> None:
    ties = torch.arange(-140, 140).float() + 0.5
    beside = torch.stack([ties.nextafter(torch.tensor(torch.inf)), ties, ties.nextafter(torch.tensor(-torch.inf))])
    for scale in (1.0, 0.25, 3.0):
        codes, _ = IMPLEMENTATIONS[implementation](beside * scale, torch.tensor([scale]), None, 8)
        expected = (beside * scale / scale).double().round().clamp(-128, 127)
        assert torch.equal(codes.double(), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_ends_of_float32_are_clipped(implementation: str) -> None:
    smallest, largest = 2.0**-149, torch.finfo(torch.float32).max
    x = torch.tensor([[torch.inf, -torch.inf, largest, -largest, smallest, 1e9, 1 / 2 - 2.0**-25]])
    codes, _ = IMPLEMENTATIONS[implementation](x, torch.ones(1), None, 8)
    assert codes.tolist() == [[127, -128, 127, -128, 0, 127, 0]]
    codes, scales = IMPLEMENTATIONS[implementation](torch.tensor([[smallest, -smallest]]), None, None, 8)
    assert (codes.tolist(), scales.tolist()) == ([[0, 0]], [1.0])


def test_rows_in_any_order_and_none() -> None:
    x = values((7, 40, 3), torch.float32).transpose(1, 2)
    assert all(map(torch.equal, launch(x, None, None, 8), quantize_rows(x)))
    for shape in ((0, 8), (3, 0)):
        assert all(map(torch.equal, launch(torch.ones(shape), None, None, 8), quantize_rows(torch.ones(shape))))


def test_the_codes_keep_to_their_bits() -> None:
    for bits in (2, 5):
        codes, _ = launch(values((5, 300), torch.float32), torch.tensor([0.01]), None, bits)
        assert (int(codes.min()), int(codes.max())) == code_range(bits)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((torch.zeros(2, 3, dtype=torch.int8),), r"x must be floating point \[..., K\]"),
        ((torch.zeros(()),), r"x must be floating point \[..., K\]"),
        ((torch.zeros(1, 16385),), "x must have at most 16384 columns"),
        ((torch.zeros(2, 3), torch.ones(2)), r"scale must be torch.float32 \[1\]"),
        ((torch.zeros(2, 3), torch.ones(1), torch.ones(1)), r"zero_point must be torch.int32 \[1\]"),
        ((torch.zeros(2, 3), None, torch.ones(1, dtype=torch.int32)), "zero_point must be None without scale"),
        ((torch.zeros(2, 3), None, None, 9), "bits must lie in 2..8, got 9"),
    ],
)
def test_what_does_not_fit_is_named(given: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quantize_rows(*given)


def test_torch_compile_and_export_see_one_op() -> None:
    operation = torch.ops.diffpress.quantize_rows.default
    torch.library.opcheck(operation, (torch.randn(2, 3, 8), None, None, 8))
    torch.library.opcheck(operation, (torch.randn(2, 8), torch.ones(1), torch.ones(1, dtype=torch.int32), 4))
