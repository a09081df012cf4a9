"""weight_only_linear against the same layer in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffpress.kernels import code_range, pack_codes, unpack_codes, weight_only_linear
from diffpress.kernels.processor import fast_dtype
from diffpress.kernels.weight_only_linear.triton_kernel import columns_of_a_part, launch

SHAPES = [
    ((1,), 1, 1, 1),
    ((63,), 63, 100, 16),
    ((2, 7), 100, 33, 100),
    ((3, 1, 5), 64, 8, 32),
    ((), 17, 9, 64),
    ((0,), 8, 4, 3),
    ((5,), 1000, 6, 128),
]
"""Leading sizes, K, N, group size: whole, short and single groups."""
KERNEL_SHAPES = [
    ((1,), 1, 1, 16),
    ((63,), 1000, 20, 128),
    ((100,), 63, 64, 24),
    ((5, 13), 192, 130, 32),
    ((2,), 700, 9, 100),
]
"""The same for the kernel: groups that a tile lies in and others, sums by one program and by several."""
WIDTHS = [2, 3, 4, 8]
KERNEL_WAYS = [
    (3, torch.float32),
    (4, torch.float16),
    *(pytest.param(bits, torch.float32, marks=pytest.mark.long) for bits in (2, 4, 8)),
    *(pytest.param(bits, torch.float16, marks=pytest.mark.long) for bits in (2, 3, 8)),
]
"""Bits, dtype; not bfloat16, in which Triton's interpreter can not multiply. Codes of 3 bits lie across bytes."""
Arguments = tuple[Any, ...]


def arguments(
    lead: tuple[int, ...], depth: int, rows: int, group_size: int, bits: int, dtype: torch.dtype, bias: bool = True
) -> Arguments:
    """Weights that use every code, with scales that differ from group to group."""
    generator = torch.Generator().manual_seed(depth + rows + bits)
    low, high = code_range(bits)
    codes = torch.randint(low, high + 1, (rows, depth), dtype=torch.int8, generator=generator)
    scale = (torch.rand(rows, -(-depth // group_size), generator=generator) + 0.5) / high / depth**0.5
    x = torch.randn(*lead, depth, generator=generator).to(dtype)
    offset = torch.randn(rows, generator=generator).to(dtype) if bias else None
    return x, pack_codes(codes, bits), scale, offset, bits, group_size


def dequantized(given: Arguments) -> Tensor:
    """The weights [N, K] in float64, column by column."""
    x, weight, scale, _, bits, group_size = given
    codes = unpack_codes(weight, x.shape[-1], bits).double()
    return torch.stack([codes[:, k] * scale[:, k // group_size] for k in range(codes.shape[1])], 1)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("lead", "depth", "rows", "group_size"), SHAPES)
def test_matches_float64(lead: tuple[int, ...], depth: int, rows: int, group_size: int, bits: int, bias: bool) -> None:
    """A weight is rounded once, and a sum of K products and the bias K + 1 times at most, in whatever order."""
    given = arguments(lead, depth, rows, group_size, bits, torch.float32, bias)
    x, weights = given[0].double(), dequantized(given)
    offset = given[3].double() if bias else torch.zeros(rows).double()
    output = weight_only_linear(*given)
    assert output.shape == (*lead, rows)
    largest = x.abs() @ weights.t().abs() + offset.abs()
    roundings = (depth + 2) * torch.finfo(torch.float32).eps / 2
    assert torch.all((output.double() - (x @ weights.t() + offset)).abs() <= roundings * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", WIDTHS)
def test_is_a_linear_layer_of_the_inputs_dtype(bits: int, dtype: torch.dtype) -> None:
    x, weight, scale, bias, *rest = arguments((9,), 63, 10, 16, bits, dtype)
    weights, wide = dequantized((x, weight, scale, bias, *rest)).float().to(dtype), fast_dtype(x)
    expected = F.linear(x.to(wide), weights.to(wide), bias.to(wide)).to(dtype)
    # A float32 bias, as a model that keeps its small tensors exact has it, is cast like the weights.
    for offset in (bias, bias.float()):
        assert torch.equal(weight_only_linear(x, weight, scale, offset, *rest), expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("bits", "dtype"), KERNEL_WAYS, ids=str)
@pytest.mark.parametrize(("lead", "depth", "rows", "group_size"), KERNEL_SHAPES)
def test_the_kernel_matches_float64(
    lead: tuple[int, ...], depth: int, rows: int, group_size: int, bits: int, dtype: torch.dtype
) -> None:
    """A sum of K products and the bias is rounded K + 1 times, then once to `dtype`; the weights are in it already."""
    given = arguments(lead, depth, rows, group_size, bits, dtype, bias=bits != 3)
    x, offset = given[0].double(), torch.zeros(()) if given[3] is None else given[3].double()
    # As the operation rounds them: in float32, then to the dtype.
    scale = given[2].repeat_interleave(group_size, 1)[:, :depth]
    weights = (unpack_codes(given[1], depth, bits).float() * scale).to(dtype).double()
    expected, largest = x @ weights.t() + offset, x.abs() @ weights.t().abs() + offset.abs()
    output = launch(*given)
    assert (output.dtype, output.shape) == (dtype, (*lead, rows))
    final = torch.finfo(dtype)
    allowed = (depth + 1) * 2.0**-24 * largest + final.eps / 2 * expected.abs() + final.tiny * final.eps
    assert ((output.double() - expected).abs() <= allowed).all()


def test_few_tiles_are_shared_by_several_programs() -> None:
    assert columns_of_a_part(1000, 4096, 64) == 4096
    assert columns_of_a_part(66, 4096, 64) == 1024
    assert columns_of_a_part(1, 1000, 64) == 384
    assert columns_of_a_part(1, 100, 64) == 128
    assert columns_of_a_part(1, 0, 64) == 64


def test_the_kernel_gives_the_same_bits_twice() -> None:
    given = arguments((3,), 1000, 20, 128, 4, torch.float16)
    assert torch.equal(launch(*given), launch(*given))


@pytest.mark.parametrize("bits", WIDTHS)
def test_is_a_well_behaved_operation(bits: int) -> None:
    given = arguments((3, 5), 33, 6, 8, bits, torch.float32)
    torch.library.opcheck(torch.ops.diffpress.weight_only_linear.default, given)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.tensor(1.0), r"x must be floating point \[..., K\]"),
        (1, torch.zeros(4, 7, dtype=torch.uint8), r"weight must be torch.uint8 \[N, 5\] at 4 bits.*\[4, 7\]"),
        (1, torch.zeros(4, 5, dtype=torch.int8), "weight must be torch.uint8.*got torch.int8"),
        (2, torch.ones(4), r"weight_scale must be torch.float32 \[4, 3\], got torch.float32 \[4\]"),
        (2, torch.ones(4, 2), r"weight_scale must be torch.float32 \[4, 3\], got torch.float32 \[4, 2\]"),
        (2, torch.ones(4, 3).half(), "weight_scale must be torch.float32.*got torch.float16"),
        (3, torch.ones(3), r"bias must be floating point \[4\]"),
        (4, 6, "weight_bits must be 2, 3, 4 or 8, got 6"),
        (5, 0, "group_size must be at least 1, got 0"),
        (5, 5, r"weight_scale must be torch.float32 \[4, 2\]"),
    ],
)
def test_what_does_not_fit_is_named(position: int, value: object, message: str) -> None:
    given = list(arguments((2,), 9, 4, 4, 4, torch.float32))
    given[position] = value
    with pytest.raises(ValueError, match=message):
        weight_only_linear(*given)
