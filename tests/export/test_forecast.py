"""A forecast's arithmetic: what it gives, and that it leaves alone what it is made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffpress.export.runtime.forecast import forecast

WEIGHTS = ([1.0], [1.7, -0.7], [2.1, -1.6, 0.5])


@pytest.mark.parametrize("shape", [(2, 8, 5, 3), (2, 7, 8)], ids=["map", "tokens"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=["order 0", "order 1", "order 2"])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_it_is_the_weighted_sum_corrected_and_added(
    shape: tuple[int, ...], weights: list[float], corrected: bool, added: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, *past = (torch.randn(shape, generator=generator) for _ in range(1 + len(weights)))
    correction = torch.randn(2, 8, generator=generator) if corrected else None
    before = [own.clone() for own in (x, *past)]
    found = forecast(x if added else None, [torch.tensor(w) for w in weights], past, correction)
    expected, magnitude = truth(x if added else None, weights, past, correction)
    # Nine operations one after the other at the most, each off by half of the last of 24 bits of what was added up so far.
    assert ((found - expected).abs() <= 9 * 2.0**-24 * magnitude).all()
    assert all(torch.equal(own, was) for own, was in zip((x, *past), before, strict=True))


def truth(
    x: Tensor | None, weights: list[float], past: list[Tensor], correction: Tensor | None
) -> tuple[Tensor, Tensor]:
    """In double precision, beside the sum of the magnitudes that were added up."""
    rounded = torch.tensor(weights).double().tolist()
    first, *rest = (y.double() for y in past)
    y, size = first, first.abs()
    for w, other in zip(rounded[1:], rest, strict=True):
        # An interpolation may start at either end.
        y, size = y + w * (other - first), size + (1 + abs(w)) * (other.abs() + first.abs())
    if correction is not None:
        scale, shift = correction.double().view(2, -1, *[1] * (y.ndim - 2)) if y.ndim == 4 else correction.double()
        y, size = y * scale + shift, size * scale.abs() + shift.abs()
    return (y, size) if x is None else (y + x, size + x.abs())
