"""The integer product is exact, in each of its forms, and never computed by a form that is naive where it runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffpress.kernels import integer_matmul as module
from diffpress.kernels.integer_matmul import EXACT_COLUMNS, byte_products, float_products, integer_matmul

SHAPES = [
    (1, 1, 1),
    (1, 63, 100),
    (16, 100, 7),
    (17, 64, 8),
    (100, 1000, 63),
    (63, 8, 1),
    (0, 5, 3),
    (5, 0, 3),
    (33, 1, 16),
    (2, 1, 2),
    (3, EXACT_COLUMNS - 1, 5),
    (3, EXACT_COLUMNS, 5),
    (3, EXACT_COLUMNS + 1, 5),
    (2, 20 * EXACT_COLUMNS, 3),
]
"""M, K, N."""
ZEROS = [None, -128, -5, 127]
FORMS = [float_products, byte_products]


def random_codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(params=[True, False], ids=["bytes", "floats"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take one form wherever it is right, on every processor."""
    monkeypatch.setattr(module, "why_no_byte_products", lambda: None if request.param else "asked not to")


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
def test_random_codes(M: int, K: int, N: int, zero: int | None) -> None:  # noqa: N803
    left, right = random_codes(M, K), random_codes(N, K)
    product = integer_matmul(left, right, None if zero is None else torch.tensor([zero], dtype=torch.int32))
    assert product.dtype == torch.int32
    assert torch.equal(product.long(), (left.long() - (zero or 0)) @ right.long().t())


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize(("left", "right"), [(-128, -128), (-128, 127), (127, 127)])
@pytest.mark.parametrize("depth", [2, EXACT_COLUMNS - 1, EXACT_COLUMNS, EXACT_COLUMNS + 1, 20 * EXACT_COLUMNS])
def test_sums_of_extremes_do_not_saturate(left: int, right: int, depth: int, zero: int | None) -> None:
    # Pairs of such products do not fit 16 bits, in which some processors' instructions add them.
    codes = [torch.full((20, depth), code, dtype=torch.int8) for code in (left, right)]
    product = integer_matmul(*codes, None if zero is None else torch.tensor([zero], dtype=torch.int32))
    assert torch.all(product == (left - (zero or 0)) * right * depth)


@pytest.mark.parametrize("products", FORMS)
def test_a_sum_that_float32_does_not_hold_is_exact(products: Callable[[Tensor, Tensor], Tensor]) -> None:
    """2**24 + 1 is the first, and takes 1,025 columns."""
    left = torch.full((1, 1025), -128, dtype=torch.int8)
    right = left.clone()
    left[0, -1] = right[0, -1] = 1
    assert products(left, right).item() == 2**24 + 1


@pytest.mark.usefixtures("form")
def test_strided_codes() -> None:
    codes = random_codes(40, 30)
    left, right = codes[::2, 1:-1:2], codes.t()[1::3, :14]
    assert torch.equal(integer_matmul(left, right).long(), left.long() @ right.long().t())


@pytest.mark.parametrize("reason", [None, "the processor lacks AVX512-VNNI"])
def test_bytes_are_multiplied_only_where_that_is_fast(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> None:
    calls: list[Tensor] = []
    monkeypatch.setattr(module, "why_no_byte_products", lambda: reason)
    monkeypatch.setattr(module, "byte_products", lambda left, right: calls.append(left) or float_products(left, right))
    integer_matmul(random_codes(4, 8), random_codes(2, 8))
    assert len(calls) == (reason is None)
    # Noise in torch 2.13.
    integer_matmul(random_codes(4, 1), random_codes(2, 1))
    assert len(calls) == (reason is None)
