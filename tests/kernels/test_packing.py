"""Codes of a few bits in bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffpress.kernels import code_range, pack_codes, packed_form, unpack_codes

WIDTHS = [2, 3, 4, 8]


@given(rows=st.integers(0, 5), columns=st.integers(1, 67), bits=st.sampled_from(WIDTHS), seed=st.integers(0, 2**31))
def test_round_trip(rows: int, columns: int, bits: int, seed: int) -> None:
    low, high = code_range(bits)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8, generator=generator)
    packed = pack_codes(codes, bits)
    dtype, length = packed_form(columns, bits)
    assert (packed.dtype, tuple(packed.shape)) == (dtype, (rows, length))
    unpacked = unpack_codes(packed, columns, bits)
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize(
    ("bits", "codes", "stored"),
    [
        (4, [1, -1, -8], [0xF1, 0x08]),
        (2, [1, -2, -1, 0, 1], [0b00_11_10_01, 0b01]),
        # Codes 2 and 5 lie across two bytes.
        (3, [1, -4, -1, 2, 0, 3, -2, -3, 1], [0b11_100_001, 0b1_000_010_1, 0b101_110_01, 0b001]),
        (3, [-1, -1, -1], [0xFF, 0x01]),
        (8, [-128, 127], [-128, 127]),
    ],
)
def test_the_first_code_is_lowest_and_the_rest_is_zero(bits: int, codes: list[int], stored: list[int]) -> None:
    assert pack_codes(torch.tensor([codes], dtype=torch.int8), bits).tolist() == [stored]


@pytest.mark.parametrize("bits", [2, 4])
def test_every_byte_unpacks_to_its_codes(bits: int) -> None:
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    unpacked = unpack_codes(every, 8 // bits, bits)
    assert torch.equal(pack_codes(unpacked, bits), every)
    low, high = code_range(bits)
    assert set(unpacked.flatten().tolist()) == set(range(low, high + 1))


@pytest.mark.parametrize("bits", WIDTHS)
def test_views_that_are_not_contiguous(bits: int) -> None:
    low, high = code_range(bits)
    codes = torch.randint(low, high + 1, (7, 4), dtype=torch.int8, generator=torch.Generator().manual_seed(0)).t()
    assert torch.equal(unpack_codes(pack_codes(codes, bits), 7, bits), codes)


@pytest.mark.parametrize(("bits", "wrong"), [(4, -9), (4, 8), (4, 127), (3, 4), (3, -5), (2, 2), (2, -3)])
def test_codes_beyond_their_bits_are_refused(bits: int, wrong: int) -> None:
    low, high = code_range(bits)
    with pytest.raises(ValueError, match=rf"{bits}-bit codes must lie in {low}\.\.{high}, got .*{wrong}"):
        pack_codes(torch.tensor([[0, wrong]], dtype=torch.int8), bits)


@pytest.mark.parametrize("bits", [1, 5, 16])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"stored in 2, 3, 4 or 8 bits, not in {bits}"):
        pack_codes(torch.zeros(1, 8, dtype=torch.int8), bits)
