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
# fmt: off
LOGARITHM = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
             2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)
# fmt: on
QUARTERS_OF_PI = (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)
"""One, in parts that float32 multiplies exactly."""


class TorchNoise:
    """What `torch.Generator().manual_seed(seed)` draws, one tensor after the other, on x86 bit for bit.

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
    radius = np.sqrt(np.float32(-2) * _logarithm(1 - halves[:, 0]))
    sine, cosine = _sine_and_cosine(np.float32(2 * math.pi) * halves[:, 1])
    return np.stack([radius * cosine, radius * sine], axis=1).reshape(-1) + np.float32(0)


def _fused(left: Floats, right: Floats | float, added: Floats | float) -> Floats:
    """left * right + added, rounded once: in float64 the product is exact."""
    double = left.astype(np.float64) * np.float32(right) + np.float32(added)
    return double.astype(np.float32)


def _logarithm(x: Floats) -> Floats:
    """Of numbers above 0, as torch's vectors compute it (Cephes, by avx_mathfun.h of G. Garberoglio)."""
    fraction, exponent = np.frexp(x)
    small = fraction < np.float32(math.sqrt(0.5))
    power = (exponent - small).astype(np.float32)
    rest = (fraction - np.float32(1)) + np.where(small, fraction, np.float32(0))
    square = rest * rest
    series = np.full_like(rest, LOGARITHM[0])
    for term in LOGARITHM[1:]:
        series = _fused(series, rest, term)
    series = _fused(series * rest, square, power * np.float32(-2.12194440e-4))
    series = _fused(-square, 0.5, series)
    return _fused(power, 0.693359375, rest + series)


def _sine_and_cosine(x: Floats) -> tuple[Floats, Floats]:
    """Of angles of 0 and more, as `_logarithm`."""
    octant = (x * np.float32(4 / math.pi)).astype(np.int32) + 1 & ~1
    for part in QUARTERS_OF_PI:
        x = _fused(octant.astype(np.float32), part, x)
    square = x * x
    even = _fused(np.full_like(x, 2.443315711809948e-5), square, -1.388731625493765e-3)
    even = _fused(even, square, 4.166664568298827e-2) * square
    even = _fused(even, square, -(square * np.float32(0.5))) + np.float32(1)
    odd = _fused(np.full_like(x, -1.9515295891e-4), square, 8.3321608736e-3)
    odd = _fused(odd, square, -1.6666654611e-1) * square
    odd = _fused(odd, x, x)
    turned = (octant & 2).astype(bool)
    sine, cosine = np.where(turned, even, odd), np.where(turned, odd, even)
    return np.where(octant & 4, -sine, sine), np.where((octant - 2) & 4, cosine, -cosine)
