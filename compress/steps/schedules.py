"""Step modes set by hand: which steps are computed in full (A-SDM, 2406.00210, iv; DeepCache, 2312.00858, for `centre`)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

BENDS = (1.3, 1.8)
"""Powers of a step's share of the run, by which modes are denser at one place: a little, and more."""

Mode = Callable[[NDArray[np.float64], float], NDArray[np.float64]]

MODES: dict[str, Mode] = {
    "uniform": lambda share, _bend: share,
    "early": lambda share, bend: share**bend,
    "late": lambda share, bend: 1 - (1 - share) ** bend,
    "centre": lambda share, bend: 0.5 + 0.5 * np.sign(2 * share - 1) * np.abs(2 * share - 1) ** bend,
}
"""From the share of computed steps that lie before one to the share of all steps that do; named by where they are dense."""


def computed_steps(mode: str, steps: int, count: int, bend: float = BENDS[0]) -> NDArray[np.bool_]:
    """[S] with `count` steps computed, the first among them. Raises KeyError for a mode that there is not."""
    places = MODES[mode](np.arange(count) / count, bend) * steps
    found = np.zeros(steps, dtype=bool)
    found[0] = True
    for place in places[1:]:
        free = np.flatnonzero(~found)
        found[free[np.abs(free - place).argmin()]] = True
    return found
