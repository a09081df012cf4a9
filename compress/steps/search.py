"""The plan that errs least at a speed: every mode and forecast is tried, then the best ones are changed step by step.

As in ECAD (Aggarwal et al., 2025, 2506.15682) the judge is the model that will run: whole runs, not a proxy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random

from diffpress.calibration.trajectory import Progress

from .budget import Budget
from .candidates import Candidate, Forecasting, beginnings, changed
from .trials import Trials

PARENTS = 3
"""The best so far, from which the next is made."""
PROPOSALS = 10_000
"""Changes that are looked at, those that were tried before included: a small plan has few neighbours."""


def search(
    trials: Trials,
    budget: Budget,
    speedup: float,
    count: int,
    forecasts: Sequence[Forecasting],
    patterns: int | None,
    seed: int,
    notify: Progress,
) -> list[tuple[Candidate, float]]:
    """What was tried, `count` at the most, with its error, the best first.

    The same errors give the same search, so that one that was killed goes on.
    """
    tried: dict[Candidate, float] = {}

    def ranked() -> list[tuple[Candidate, float]]:
        return sorted(tried.items(), key=lambda item: item[1])

    for own in _proposals(budget, speedup, forecasts, patterns, Random(seed), ranked):
        if own not in tried:
            tried[own] = trials.error(own)
            notify(len(tried), count)
        if len(tried) == count:
            break
    notify(count, count)
    return ranked()


def _proposals(
    budget: Budget,
    speedup: float,
    forecasts: Sequence[Forecasting],
    patterns: int | None,
    random: Random,
    ranked: Callable[[], list[tuple[Candidate, float]]],
) -> Iterator[Candidate]:
    """Modes, then forecasts of the best, then changes of the best few; `ranked` tells what is known when the next is asked."""
    yield from beginnings(budget, speedup, forecasts[0])
    for forecast in forecasts:
        yield replace(ranked()[0][0], forecast=forecast)
    for _ in range(PROPOSALS):
        known = ranked()
        parent = known[min(random.randrange(PARENTS), len(known) - 1)][0]
        child = changed(parent, budget, speedup, patterns, random)
        if child is None:
            return
        yield child
