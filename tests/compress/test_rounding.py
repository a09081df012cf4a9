"""Rounding that is trained through: the numbers of the kernels, and the gradients of learned step sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffpress.compress.rounding import SMALLEST_HALF, fake_quantize, straight_through_round, to_half
from diffpress.kernels import code_range, dequantize, quantize

BITS = range(2, 9)
SHAPES = {
    "one for all": ((5, 33), (1,)),
    "one a row": ((5, 33), (5, 1)),
    "one a channel": ((5, 3, 3, 2), (5, 1, 1, 1)),
    "one an entry of the batch": ((4, 3, 7), (4, 1, 1)),
    "one a value": ((5, 33), (5, 33)),
}
DOUBLE = torch.finfo(torch.float64).eps


def numbers(
    shape: tuple[int, ...], scale_shape: tuple[int, ...], bits: int, asymmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values of which some are clipped at either end, scales of either sign, and whole zero points."""
    generator = torch.Generator().manual_seed(bits)
    low, high = code_range(bits)
    scale = (0.1 + torch.rand(scale_shape, generator=generator, dtype=dtype)) * 0.1
    scale *= torch.where(torch.rand(scale_shape, generator=generator) < 0.5, -1.0, 1.0)
    values = torch.randn(shape, generator=generator, dtype=dtype) * scale.abs() * high
    zero_point = torch.randint(low, high + 1, scale_shape, generator=generator).to(dtype) if asymmetric else None
    return values, scale, zero_point


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("shape", "scale_shape"), SHAPES.values(), ids=SHAPES)
def test_forward_is_what_the_kernels_compute(
    shape: tuple[int, ...], scale_shape: tuple[int, ...], bits: int, asymmetric: bool
) -> None:
    values, scale, zero_point = numbers(shape, scale_shape, bits, asymmetric, torch.float32)
    expected = dequantize(quantize(values, scale, bits, zero_point), scale, zero_point)
    assert torch.equal(fake_quantize(values, scale, zero_point, bits), expected)


def test_ties_zeros_and_what_is_far_outside_are_the_kernels_too() -> None:
    scale, zero_point = torch.tensor([0.5]), torch.tensor([3.0])
    values = torch.tensor([0.0, -0.0, 0.25, 0.75, -0.25, -0.75, 1e30, -1e30, torch.inf, -torch.inf])
    for bits in BITS:
        for zero in (None, zero_point.clamp(*code_range(bits))):
            expected = dequantize(quantize(values, scale, bits, zero), scale, zero)
            assert torch.equal(fake_quantize(values, scale, zero, bits), expected)


def test_inputs_are_not_written_to() -> None:
    values, scale, zero_point = numbers((5, 33), (5, 1), 4, True, torch.float32)
    before = [tensor.clone() for tensor in (values, scale, zero_point) if tensor is not None]
    fake_quantize(values, scale, zero_point, 4)
    assert all(map(torch.equal, before, [tensor for tensor in (values, scale, zero_point) if tensor is not None]))


def composed(values: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """The same out of operations that autograd knows."""
    zero = torch.zeros_like(scale) if zero_point is None else zero_point
    codes = (straight_through_round(values / scale) + zero).clamp(*code_range(bits))
    return (codes - zero) * scale


Function = Callable[[Tensor, Tensor, Tensor | None, int], Tensor]


def gradients(
    function: Function, values: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, weights: Tensor
) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in (values, scale, zero_point) if tensor is not None]
    output = function(leaves[0], leaves[1], leaves[2] if zero_point is not None else None, bits)
    return list(torch.autograd.grad((output * weights).sum(), leaves))


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("shape", "scale_shape"), SHAPES.values(), ids=SHAPES)
def test_gradients_are_those_of_the_composition(
    shape: tuple[int, ...], scale_shape: tuple[int, ...], bits: int, asymmetric: bool
) -> None:
    values, scale, zero_point = numbers(shape, scale_shape, bits, asymmetric, torch.float64)
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    arguments = (values, scale, zero_point, bits, weights)
    # Each is a sum of as many terms as values share a scale; a term is a code, or a value counted in scales, at most.
    terms = values.numel() / scale.numel()
    largest = float(weights.abs().max() * (2**bits + (values / scale).abs().max()))
    tolerance = 4 * DOUBLE * terms * largest
    for ours, theirs in zip(gradients(fake_quantize, *arguments), gradients(composed, *arguments), strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= tolerance


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_the_slopes_of_what_rounding_holds_fixed(bits: int, asymmetric: bool) -> None:
    """Rounding moves a value by a fixed share of a step; with that held fixed the function has slopes to measure.

    It is linear in each argument wherever nothing begins or stops to be clipped, so a central difference over 2h has no
    error but rounding: that of two sums, over 2h.
    """
    values, scale, zero_point = numbers((4, 31), (4, 1), bits, asymmetric, torch.float64)
    moved = (values / scale).round() - values / scale
    low, high = code_range(bits)
    zero = torch.zeros_like(scale) if zero_point is None else zero_point
    codes = (values / scale).round() + zero
    below, above = codes < low, codes > high
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def smooth(x: Tensor, s: Tensor, z: Tensor) -> float:
        inside = (x / s + moved) * s
        clipped = torch.where(below, low - z, high - z) * s
        return float((torch.where(below | above, clipped, inside) * weights).sum())

    found = gradients(fake_quantize, values, scale, zero_point, bits, weights)
    arguments = [values, scale, zero]
    h = 1e-6
    size = float((values.abs() + 2**bits * scale.abs()).mul(weights.abs()).sum())
    tolerance = 8 * DOUBLE * size / (2 * h)
    for index, gradient in enumerate(found):
        for entry in range(0, gradient.numel(), 7 if index == 0 else 1):
            ends = []
            for sign in (1, -1):
                changed = [argument.clone() for argument in arguments]
                changed[index].view(-1)[entry] += sign * h
                ends.append(smooth(*changed))
            assert abs((ends[0] - ends[1]) / (2 * h) - float(gradient.view(-1)[entry])) <= tolerance


def test_only_gradients_that_are_asked_for_are_computed() -> None:
    values, scale, zero_point = numbers((5, 33), (5, 1), 4, True, torch.float32)
    values.requires_grad_()
    fake_quantize(values, scale, zero_point, 4).sum().backward()
    assert values.grad is not None
    assert scale.grad is None


def test_straight_through_rounding_is_exact() -> None:
    """x + (round(x) - x): the difference is exact, since round(x) is 0 or within a factor of 2 of x (Sterbenz)."""
    values = torch.cat([torch.linspace(-300, 300, 60001), torch.tensor([0.5, 1.5, -0.5, 0.49999997, 0.50000006, 1e7])])
    values.requires_grad_()
    rounded = straight_through_round(values)
    assert torch.equal(rounded, values.round())
    rounded.sum().backward()
    assert values.grad is not None
    assert (values.grad == 1).all()


def test_scales_become_the_nearest_numbers_of_float16() -> None:
    """A unit of float16 is 2^-10 of its power of two, and 2^-24 below 2^-14; half of one is what rounding may cost."""
    scale = torch.logspace(-19.9, 15.9, 1000, base=2) * torch.tensor([1.0, -1.0]).repeat(500)
    rounded = to_half(scale)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded.half().float(), rounded)
    assert ((rounded - scale).abs() <= torch.clamp(scale.abs() * 2**-11, min=2.0**-25)).all()


def test_scales_that_float16_cannot_reach_stay_as_they_are() -> None:
    scale = torch.tensor([SMALLEST_HALF * 0.9, 1e-30, 7e4, -1e9, 0.1], requires_grad=True)
    rounded = to_half(scale)
    assert torch.equal(rounded[:4], scale[:4])
    assert rounded[4] == scale[4].half().float() != scale[4]
    rounded.sum().backward()
    assert torch.equal(scale.grad, torch.ones(5))
