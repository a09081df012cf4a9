"""The runner's noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffpress.export.portable.noise import torch_noise


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 7, 2**63 - 1])
@pytest.mark.parametrize("size", [16, 17, 31, 784, 10_003])
def test_equals_pythons_bit_for_bit(probe, size: int, seed: int) -> None:
    assert probe("noise", size, seed) == torch_noise((size,), seed).tobytes()


@pytest.mark.parametrize("size", [1, 2, 9, 15])
def test_few_numbers_are_those_of_torch(probe, size: int) -> None:
    found = np.frombuffer(probe("noise", size, 3), np.float32)
    assert found.tolist() == torch.randn(size, generator=torch.Generator().manual_seed(3)).tolist()
