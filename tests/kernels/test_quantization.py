"""Rounding to symmetric integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffpress.kernels import code_range, dequantize, quantize

ONE = torch.ones(1)


@pytest.mark.parametrize(("bits", "low", "high"), [(8, -128, 127), (4, -8, 7), (2, -2, 1)])
def test_code_range(bits: int, low: int, high: int) -> None:
    assert code_range(bits) == (low, high)


def test_halves_round_to_even() -> None:
    values = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.49])
    assert quantize(values, ONE, 8).tolist() == [-2, -2, 0, 0, 2, 2, 3]


@pytest.mark.parametrize("bits", [4, 8])
def test_values_beyond_the_range_are_clipped(bits: int) -> None:
    low, high = code_range(bits)
    values = torch.tensor([-1e30, low - 0.6, low, high, high + 0.6, 1e30, float("inf"), -float("inf")])
    assert quantize(values, ONE, bits).tolist() == [low, low, low, high, high, high, high, low]


@given(values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20), scale=st.floats(0.0625, 4, width=32))
def test_inside_the_range_the_error_is_half_a_step(values: list[float], scale: float) -> None:
    x, step = torch.tensor(values), torch.tensor([scale])
    low, high = code_range(8)
    kept = x.clamp(low * scale, high * scale)
    error = (dequantize(quantize(x, step, 8), step) - kept).abs()
    # Half a step, and the rounding of the division and of the product in float32.
    assert torch.all(error <= scale / 2 + 2 * torch.finfo(torch.float32).eps * kept.abs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_divided_in_float32(dtype: torch.dtype) -> None:
    # In half precision many of these quotients round to a neighbouring code.
    values = torch.arange(-120, 120, dtype=torch.float32).mul(0.0371).to(dtype)
    scale = torch.tensor([0.0373])
    assert torch.equal(quantize(values, scale, 8), quantize(values.float(), scale, 8))


def test_scales_broadcast_over_rows() -> None:
    values = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    assert quantize(values, torch.tensor([[1.0], [0.5]]), 8).tolist() == [[1, 2], [2, 4]]
