"""Torch's noise without torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffpress.export.errors import UserError
from diffpress.export.portable.noise import TorchNoise, torch_noise


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32 + 7, 2**63 - 1])
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (16,), (17,), (31,), (1, 3, 5, 7), (1, 1, 28, 28), (100_003,)])
def test_equals_torch(shape: tuple[int, ...], seed: int) -> None:
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()
    # Where it has no AVX2 torch asks the C library for logarithm and cosine: a few roundings of values up to five.
    fits = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    np.testing.assert_allclose(torch_noise(shape, seed), expected, rtol=0, atol=0 if fits else 5 * 2**-21)


def test_few_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        torch_noise((1, 3, 2, 2), 0)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 + 3])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(UserError, match="from 0 to"):
        torch_noise((16,), seed)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (17,), (1, 3, 5, 7)])
def test_later_draws_equal_torchs(shape: tuple[int, ...]) -> None:
    generator, same = torch.Generator().manual_seed(3), TorchNoise(3)
    for _ in range(5):
        expected = torch.randn(shape, generator=generator).numpy()
        np.testing.assert_allclose(same.draw(shape), expected, atol=5 * 2**-21)
