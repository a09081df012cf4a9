"""semi_structured_linear against the same layer in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffpress.kernels import pack_semi_structured, semi_structured_linear
from diffpress.kernels.semi_structured_linear.cusparselt import launch, takes
from diffpress.kernels.semi_structured_linear.pack import unpack_semi_structured

SHAPES = [((1,), 4, 1), ((63,), 1000, 100), ((2, 7), 100, 33), ((), 12, 9), ((0,), 8, 4), ((5,), 64, 32)]
"""Leading sizes, K, N."""
Arguments = tuple[Tensor, Tensor, Tensor, Tensor]


def arguments(lead: tuple[int, ...], depth: int, rows: int, dtype: torch.dtype) -> tuple[Arguments, Tensor]:
    """The arguments, and the weight whose two smallest of every four are zeroed."""
    generator = torch.Generator().manual_seed(depth + rows)
    weight = (torch.randn(rows, depth, generator=generator) / depth**0.5).to(dtype)
    fours = weight.unflatten(1, (-1, 4))
    smallest = fours.abs().argsort(2)[:, :, :2]
    x = torch.randn(*lead, depth, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype)
    # Zeroed before it is packed, since of equal magnitudes either may be kept.
    weight = fours.scatter(2, smallest, 0).flatten(1)
    return (x, *pack_semi_structured(weight), bias), weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", [semi_structured_linear, launch], ids=["public", "launch"])
@pytest.mark.parametrize(("lead", "depth", "rows"), SHAPES)
def test_matches_float64(
    lead: tuple[int, ...], depth: int, rows: int, implementation: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    """A sum of K / 2 products and the bias is rounded K / 2 + 1 times, then once to `dtype`."""
    given, weight = arguments(lead, depth, rows, dtype)
    output = implementation(*given)
    assert (output.dtype, output.shape) == (dtype, (*lead, rows))
    x, bias, final = given[0].double(), given[3].double(), torch.finfo(dtype)
    expected, reach = x @ weight.double().t() + bias, x.abs() @ weight.double().abs().t() + bias.abs()
    allowed = (depth / 2 + 2) * 2.0**-24 * reach + final.eps / 2 * expected.abs() + final.tiny
    assert ((output.double() - expected).abs() <= allowed).all()


def test_two_of_every_four_are_kept() -> None:
    weight = torch.tensor([[1.0, -5, 0, 3, 0, 0, 7, 0, 2, 2, 2, 2]])
    values, positions = pack_semi_structured(weight)
    assert (values.shape, positions.shape, positions.dtype) == ((1, 6), (1, 2), torch.uint8)
    kept = unpack_semi_structured(values, positions)
    assert kept[0, :8].tolist() == [0, -5, 0, 3, 0, 0, 7, 0]
    assert kept[0, 8:].count_nonzero() == 2
    assert torch.equal(unpack_semi_structured(*pack_semi_structured(kept)), kept)


def test_torch_has_no_kernel_for_it_on_a_cpu() -> None:
    (x, values, _, _), _ = arguments((64,), 64, 32, torch.float16)
    assert not takes(x, values)


def test_torch_compile_and_export_see_one_op() -> None:
    given, _ = arguments((3, 5), 36, 6, torch.float32)
    torch.library.opcheck(torch.ops.diffpress.semi_structured_linear.default, given)


def test_a_weight_that_no_four_columns_fill_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight must be \[N, K\] with K a multiple of 4, got \[3, 6\]"):
        pack_semi_structured(torch.ones(3, 6))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.ones(2, 8, dtype=torch.int8), r"x must be floating point \[..., K\]"),
        (0, torch.ones(2, 10), r"x must be \[..., K\] with K a multiple of 4, got 10"),
        (1, torch.ones(6, 6), r"values must be torch.float32 \[N, 4\], got torch.float32 \[6, 6\]"),
        (1, torch.ones(6, 4).half(), r"values must be torch.float32 \[N, 4\], got torch.float16"),
        (2, torch.zeros(6, 2, dtype=torch.uint8), r"positions must be torch.uint8 \[6, 1\]"),
        (3, torch.ones(3), r"bias must be floating point \[6\]"),
    ],
)
def test_what_does_not_fit_is_named(position: int, value: Tensor, message: str) -> None:
    given = list(arguments((2,), 8, 6, torch.float32)[0])
    given[position] = value
    with pytest.raises(ValueError, match=message):
        semi_structured_linear(*given)
