"""The noise of torch's CPU generator, without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

Floats = NDArray[np.float32]
SEEDS = 2**63
"""All seeds are below."""
BLOCK = 16
"""torch draws normal numbers in blocks of this size; smaller tensors take another path there."""


class TorchNoise:
    """What `torch.Generator().manual_seed(seed)` draws, one tensor after the other, to float32 rounding.

    Raises UserError for a seed that is out of range.
    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < SEEDS:
            raise UserError(f"A seed is a whole number from 0 to 2^63 - 1, but got {seed}.")
        # torch seeds its Mersenne twister with the lower 32 bits, and numpy seeds an integer in the same way.
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)

    def draw(self, shape: Sequence[int]) -> Floats:
        """What `torch.randn` gives. Raises ValueError for fewer than sixteen numbers, which torch draws in another way."""
        size = math.prod(shape)
        if size < BLOCK:
            raise ValueError(f"noise of shape {tuple(shape)} has {size} numbers, at least {BLOCK} are needed")
        whole = size - size % BLOCK
        values = _uniform(self._twister, size)
        values[:whole] = _box_muller(values[:whole])
        if whole < size:
            values[-BLOCK:] = _box_muller(_uniform(self._twister, BLOCK))
        return values.reshape(shape)


def torch_noise(shape: Sequence[int], seed: int) -> Floats:
    """What `torch.randn(shape, generator=torch.Generator().manual_seed(seed))` gives (see `TorchNoise`)."""
    return TorchNoise(seed).draw(shape)


def _uniform(twister: np.random.RandomState, count: int) -> Floats:
    """The 24 lower bits of each draw, as a number in 0..1."""
    draws = twister.randint(0, 2**32, size=count, dtype=np.uint32)
    return (draws & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)


def _box_muller(uniform: Floats) -> Floats:
    """Normal numbers of blocks of sixteen uniform ones: eight radii, then eight angles.

    G. E. P. Box and M. E. Muller, A note on the generation of random normal deviates, 1958.
    """
    halves = uniform.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(-2 * np.log(1 - halves[:, 0]))
    angle = np.float32(2 * math.pi) * halves[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
