"""The integer product is exact."""

from __future__ import annotations

import pytest
import torch

from diffpress.kernels.integer_matmul import integer_matmul

SHAPES = [
    (1, 1, 1),
    (1, 63, 100),
    (16, 100, 7),
    (17, 64, 8),
    (100, 1000, 63),
    (63, 8, 1),
    (0, 5, 3),
    (33, 1, 16),
    (2, 1, 2),
]


@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
def test_random_codes(M: int, K: int, N: int) -> None:  # noqa: N803
    generator = torch.Generator().manual_seed(M + K + N)
    left, right = (torch.randint(-128, 128, (n, K), dtype=torch.int8, generator=generator) for n in (M, N))
    product = integer_matmul(left, right)
    assert product.dtype == torch.int32
    assert torch.equal(product.long(), left.long() @ right.long().t())


@pytest.mark.parametrize(("left", "right"), [(-128, -128), (-128, 127), (127, 127)])
def test_sums_of_extremes_do_not_saturate(left: int, right: int) -> None:
    # Pairs of such products do not fit 16 bits, in which some processors' instructions add them.
    shape = (20, 1003)
    product = integer_matmul(torch.full(shape, left, dtype=torch.int8), torch.full(shape, right, dtype=torch.int8))
    assert torch.all(product == left * right * shape[1])


def test_strided_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (40, 30), dtype=torch.int8, generator=generator)
    left, right = codes[::2, 1:-1:2], codes.t()[1::3, :14]
    assert torch.equal(integer_matmul(left, right).long(), left.long() @ right.long().t())


@pytest.mark.parametrize("zero", [-128, -5, 127])
@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
def test_the_zero_point_is_taken_off_without_loss(M: int, K: int, N: int, zero: int) -> None:  # noqa: N803
    generator = torch.Generator().manual_seed(M + K + N)
    left, right = (torch.randint(-128, 128, (n, K), dtype=torch.int8, generator=generator) for n in (M, N))
    product = integer_matmul(left, right, torch.tensor([zero], dtype=torch.int32))
    assert product.dtype == torch.int32
    assert torch.equal(product.long(), (left.long() - zero) @ right.long().t())
