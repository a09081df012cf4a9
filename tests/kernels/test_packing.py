"""Two 4-bit codes in a byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffpress.kernels import pack_int4, unpack_int4


@given(rows=st.integers(1, 5), columns=st.integers(1, 67), seed=st.integers(0, 2**31))
def test_round_trip(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=generator)
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, (columns + 1) // 2)
    assert torch.equal(unpack_int4(packed, columns), codes)


def test_even_column_is_the_low_half_and_odd_ends_are_zero() -> None:
    assert pack_int4(torch.tensor([[1, -1, -8]], dtype=torch.int8)).tolist() == [[0xF1, 0x08]]


def test_every_byte_unpacks_to_its_two_codes() -> None:
    unpacked = unpack_int4(torch.arange(256, dtype=torch.uint8)[:, None], 2)
    assert torch.equal(pack_int4(unpacked)[:, 0], torch.arange(256, dtype=torch.uint8))
    assert set(unpacked.flatten().tolist()) == set(range(-8, 8))


def test_no_rows_and_views_that_are_not_contiguous() -> None:
    assert pack_int4(torch.empty(0, 5, dtype=torch.int8)).shape == (0, 3)
    codes = torch.randint(-8, 8, (7, 4), dtype=torch.int8, generator=torch.Generator().manual_seed(0)).t()
    assert torch.equal(unpack_int4(pack_int4(codes), 7), codes)


@pytest.mark.parametrize("wrong", [-9, 8, 127])
def test_codes_beyond_four_bits_are_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"-8\.\.7.*{wrong}"):
        pack_int4(torch.tensor([[0, wrong]], dtype=torch.int8))
