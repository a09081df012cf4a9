"""For caches that decide by a threshold how much they compute: the one that spends what is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log, sqrt

from measure import Run, draw_and_count

from diffpress.calibration.conditions import Condition

LOWEST, HIGHEST = 1e-4, 30.0
WATCHED = 4
"""Images that a threshold is found with."""
TRIES = 9
"""Of halving, in logarithms, what lies between: to within 3 %."""


def find_threshold(
    run_at: Callable[[float], Run], full_macs: float, speedup: float, wanted: Sequence[Condition]
) -> float:
    """The threshold at which the denoiser computes nearest to `full_macs / speedup` on the `wanted`, drawn in one batch."""
    low, high = LOWEST, HIGHEST
    tried: dict[float, float] = {}
    for _ in range(TRIES):
        middle = sqrt(low * high)
        _, macs = draw_and_count(run_at(middle), wanted, len(wanted))
        tried[middle] = full_macs / macs
        low, high = (middle, high) if tried[middle] < speedup else (low, middle)
    return min(tried, key=lambda threshold: abs(log(tried[threshold] / speedup)))
