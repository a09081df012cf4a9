"""How many units go from where: whatever loses least for what it weighs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

SHARES = (0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Of a structure's units, for which it is measured what their removal costs."""
WHOLE = 8
"""Structures of fewer than so many multiples keep any number of units."""


@dataclass(frozen=True)
class Curve:
    """What removing some of a structure's units costs."""

    counts: Sequence[int]
    """How many go, rising."""
    errors: Sequence[float]
    weight: float
    """Of one unit, in what the budget is counted in."""
    step: int = 1
    """Units go by so many."""

    def slopes(self) -> list[tuple[float, int, int]]:
        """Error a weight, from how many units on, up to how many: the lower convex hull, so that slopes rise."""
        hull = [(0, 0.0)]
        for point in zip(self.counts, self.errors, strict=True):
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
                hull.pop()
            hull.append(point)
        return [(_slope(a, b) / self.weight, a[0], b[0]) for a, b in pairwise(hull)]


def _slope(before: tuple[int, float], after: tuple[int, float]) -> float:
    return (after[1] - before[1]) / (after[0] - before[0])


def counts_of(count: int, step: int) -> list[int]:
    """How many of `count` units may go for a measurement: by `step` units, and all but as many at the most."""
    most = count - step
    return sorted({min(most, max(step, ceil(share * count / step) * step)) for share in (*SHARES, 1)} - {0})


def step_of(count: int, multiple: int) -> int:
    """By how many units a structure shrinks, so that what is kept is a multiple where there are many."""
    return multiple if count >= WHOLE * multiple and count % multiple == 0 else 1


def choose(curves: Mapping[str, Curve], target: float) -> dict[str, int]:
    """How many units of each structure go, so that they weigh `target` together, or little more, at the least error.

    Errors are taken to add up. The last ones to go are rounded up to a whole step.
    """
    slopes = sorted((slope, name, low, high) for name, curve in curves.items() for slope, low, high in curve.slopes())
    chosen = dict.fromkeys(curves, 0)
    left = target
    for _, name, low, high in slopes:
        step, weight = curves[name].step, curves[name].weight
        count = min(high - low, ceil(left / (weight * step) - 1e-9) * step)
        if count <= 0:
            break
        chosen[name] = low + count
        left -= count * weight
    return chosen
