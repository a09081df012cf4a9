"""What plans cost over one image: multiply-accumulates of the denoiser, or nanoseconds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .units import Costs

Cells = NDArray[np.bool_]
"""[steps, units] whether each unit is computed."""


@dataclass(frozen=True)
class Budget:
    """Of `steps` steps."""

    costs: Costs
    steps: int

    @property
    def whole(self) -> int:
        """Where every step is computed."""
        return self.steps * self.costs.total

    def cost(self, cells: Cells) -> int:
        """Of a plan."""
        return self.steps * self.costs.rest + int((cells @ np.array(self.costs.units)).sum())

    def speedup(self, cells: Cells) -> float:
        """Of a plan over the whole."""
        return self.whole / self.cost(cells)

    @property
    def fastest(self) -> float:
        """Speed-up of the plan that computes the first step alone."""
        return self.whole / (self.steps * self.costs.rest + sum(self.costs.units))

    def rows(self, speedup: float) -> int:
        """Steps that may be computed in full; 0 where `speedup` is out of reach."""
        return max(0, int((self.whole / speedup - self.steps * self.costs.rest) / sum(self.costs.units) + 1e-9))

    def allows(self, cells: Cells, speedup: float) -> bool:
        """Whether a plan is as fast as asked."""
        return self.cost(cells) * speedup <= self.whole * (1 + 1e-9)
