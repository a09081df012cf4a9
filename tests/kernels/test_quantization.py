"""Rounding to codes and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffpress.kernels import FP8_MAX, code_range, dequantize, dequantize_groups, quantize, to_fp8

ONE = torch.ones(1)


@pytest.mark.parametrize(("bits", "low", "high"), [(8, -128, 127), (6, -32, 31), (4, -8, 7), (3, -4, 3), (2, -2, 1)])
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


def test_the_zero_point_moves_codes_after_they_are_rounded() -> None:
    values, zero = torch.tensor([-2.5, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5]), torch.tensor([3], dtype=torch.int32)
    # Rounded after moving, the halves would go the other way.
    assert quantize(values, ONE, 8, zero).tolist() == [1, 1, 3, 3, 3, 5, 5]


@pytest.mark.parametrize("zero", [-128, -7, 0, 100, 127])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_point_shifts_the_range_that_is_kept(bits: int, zero: int) -> None:
    low, high = code_range(bits)
    point, values = torch.tensor([zero], dtype=torch.int32), torch.arange(-300.0, 301.0)
    codes = quantize(values, ONE, bits, point)
    assert torch.equal(dequantize(codes, ONE, point), values.clamp(low - zero, high - zero))


@pytest.mark.parametrize(("columns", "group_size"), [(1, 1), (63, 16), (100, 100), (100, 33), (7, 64)])
def test_columns_of_a_group_share_a_scale(columns: int, group_size: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(-8, 8, (5, columns), dtype=torch.int8, generator=generator)
    scale = torch.rand(5, -(-columns // group_size), generator=generator)
    expected = torch.empty(5, columns)
    for column in range(columns):
        expected[:, column] = codes[:, column] * scale[:, column // group_size]
    assert torch.equal(dequantize_groups(codes, scale, group_size), expected)


def test_float8_goes_to_the_nearest_of_all_its_values_and_halves_to_even() -> None:
    # From 0 to the largest; the code after it is NaN.
    known = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert known[-1] == FP8_MAX
    assert torch.equal(to_fp8(known, ONE).float(), known)
    middles = (known[1:] + known[:-1]) / 2
    even = torch.where(torch.arange(126) % 2 == 0, known[:-1], known[1:])
    assert torch.equal(to_fp8(middles, ONE).float(), even)
    above = torch.nextafter(middles, torch.full_like(middles, torch.inf))
    assert torch.equal(to_fp8(-above, ONE).float(), -known[1:])


def test_float8_is_clipped_and_scaled() -> None:
    values = torch.tensor([1e30, -1e30, float("inf"), 449.0, -2.0])
    assert to_fp8(values, ONE).float().tolist() == [448, -448, 448, 448, -2]
    assert torch.equal(to_fp8(values, torch.tensor([4.0])), (values / 4).clamp(-448, 448).to(torch.float8_e4m3fn))
