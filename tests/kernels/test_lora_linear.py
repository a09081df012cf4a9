"""lora_linear, its reference and its Triton kernel, against the same layer in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffpress.kernels import code_range, lora_linear, pack_codes, spread_groups, unpack_codes
from diffpress.kernels.lora_linear.triton_kernel import launch

SHAPES = [
    ((1,), 1, 1, 16, 1),
    ((63,), 1000, 20, 128, 33),
    ((100,), 63, 64, 24, 16),
    ((2, 7), 192, 33, 64, 128),
    ((0,), 8, 4, 4, 2),
]
"""Leading sizes, K, N, group size, rank."""
WAYS = [
    *(("reference", bits, dtype) for bits in (2, 3, 4, 8) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    ("triton", 3, torch.float16),
    ("triton", 8, torch.float32),
    *(pytest.param("triton", bits, torch.float16, marks=pytest.mark.long) for bits in (2, 4, 8)),
    *(pytest.param("triton", bits, torch.float32, marks=pytest.mark.long) for bits in (3, 4)),
]
"""Implementation, bits, dtype; Triton's interpreter can not multiply bfloat16. Codes of 3 bits lie across bytes."""
Arguments = tuple[Any, ...]
SCALE = 0.75


def arguments(
    lead: tuple[int, ...], depth: int, rows: int, group_size: int, rank: int, bits: int, dtype: torch.dtype
) -> Arguments:
    """Weights that use every code, and a branch about as large as they are."""
    generator = torch.Generator().manual_seed(depth + rows + bits)
    low, high = code_range(bits)
    codes = torch.randint(low, high + 1, (rows, depth), dtype=torch.int8, generator=generator)
    scale = (torch.rand(rows, -(-depth // group_size), generator=generator) + 0.5) / high / depth**0.5
    x = torch.randn(*lead, depth, generator=generator).to(dtype)
    down = (torch.randn(rank, depth, generator=generator) / depth**0.5).to(dtype)
    up = (torch.randn(rows, rank, generator=generator) / rank**0.5).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype)
    return x, pack_codes(codes, bits), scale, down, up, bias, SCALE, bits, group_size


def truth(given: Arguments) -> tuple[Tensor, Tensor]:
    """The output in float64, and how far from it one may be.

    Each of the three sums, of K, R and K terms, is rounded once a term; scale, bias and the final sum add three. To the
    dtype are rounded the main branch, x A^T and the output.
    """
    x, weight, scale, down, up, bias, branch_scale, bits, group_size = given
    depth, rank, final = x.shape[-1], len(down), torch.finfo(x.dtype)
    weights = unpack_codes(weight, depth, bits).float() * spread_groups(scale, group_size, depth)
    weights, bias = weights.to(x.dtype).double().t(), bias.double()
    down, up, x = down.double().t(), up.double().t() * branch_scale, x.double()
    main, main_reach = x @ weights + bias, x.abs() @ weights.abs() + bias.abs()
    expected, branch_reach = main + x @ down @ up, x.abs() @ down.abs() @ up.abs()
    single = (2 * depth + rank + 3) * 2.0**-24 * (main_reach + branch_reach)
    low = (x @ down).abs() @ up.abs()
    return expected, single + final.eps / 2 * (main.abs() + low + expected.abs()) * (1 + final.eps) + final.tiny


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("implementation", "bits", "dtype"), WAYS, ids=str)
@pytest.mark.parametrize(("lead", "depth", "rows", "group_size", "rank"), SHAPES)
def test_matches_float64(
    lead: tuple[int, ...], depth: int, rows: int, group_size: int, rank: int, implementation: str, bits: int, dtype: Any
) -> None:
    given = arguments(lead, depth, rows, group_size, rank, bits, dtype)
    output = (lora_linear if implementation == "reference" else launch)(*given)
    assert (output.dtype, output.shape) == (dtype, (*lead, rows))
    expected, allowed = truth(given)
    assert ((output.double() - expected).abs() <= allowed).all()


def test_a_branch_in_another_dtype_is_cast_like_the_weights() -> None:
    given = list(arguments((5,), 63, 10, 16, 4, 4, torch.float16))
    expected = lora_linear(*given), launch(*given)
    given[3], given[4], given[5] = given[3].float(), given[4].float(), given[5].float()
    assert torch.equal(lora_linear(*given), expected[0])
    assert torch.equal(launch(*given), expected[1])


def test_torch_compile_and_export_see_one_op() -> None:
    given = arguments((3, 5), 33, 6, 8, 4, 4, torch.float32)
    torch.library.opcheck(torch.ops.diffpress.lora_linear.default, given)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.tensor(1.0), r"x must be floating point \[..., K\]"),
        (1, torch.zeros(4, 7, dtype=torch.uint8), r"weight must be torch.uint8 \[N, 5\] at 4 bits"),
        (2, torch.ones(4), r"weight_scale must be torch.float32 \[4, 3\]"),
        (3, torch.ones(2, 8), r"down must be floating point \[1..128, 9\].*\[2, 8\]"),
        (3, torch.ones(129, 9), r"down must be floating point \[1..128, 9\]"),
        (4, torch.ones(4, 3), r"up must be floating point \[4, 2\].*\[4, 3\]"),
        (5, torch.ones(3), r"bias must be floating point \[4\]"),
        (7, 6, "weight_bits must be 2, 3, 4 or 8, got 6"),
        (8, 0, "group_size must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_named(position: int, value: object, message: str) -> None:
    given = list(arguments((2,), 9, 4, 4, 2, 4, torch.float32))
    given[position] = value
    with pytest.raises(ValueError, match=message):
        lora_linear(*given)
