"""What forecasts are fitted to: second moments of the units' features between steps, channel by channel."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from diffpress.export.runtime.forecast import IMAGE
from diffpress.export.runtime.runs import Features


class FeatureMoments:
    """Per unit: `products` [S, window, C] of a step's features and those of the step so many before, and `sums` [S, C].

    Everything that is fitted by least squares follows from them, for any plan whose forecasts reach back less than `window`.
    """

    def __init__(self, steps: int, channels: Sequence[int], window: int) -> None:
        """`channels` of each unit, those of all its tensors."""
        self.window = window
        self.products = [torch.zeros(steps, window, count, dtype=torch.double) for count in channels]
        self.sums = [torch.zeros(steps, count, dtype=torch.double) for count in channels]
        self.counts = torch.zeros(steps, len(channels), dtype=torch.double)
        self._recent: dict[tuple[int, int], deque[Tensor]] = {}

    def forget(self) -> None:
        """All runs are over."""
        self._recent.clear()

    def add(self, run: int, step: int, unit: int, features: Features) -> None:
        """What `unit` computed at `step` of a `run`, the steps of which follow each other."""
        y = torch.cat([_channels(y) for y in features])
        recent = self._recent.setdefault((run, unit), deque(maxlen=self.window))
        recent.appendleft(y)
        for back, earlier in enumerate(recent):
            self.products[unit][step, back] += torch.linalg.vecdot(y, earlier).double().cpu()
        self.sums[unit][step] += y.sum(1).double().cpu()
        self.counts[step, unit] += y.shape[1]

    def between(self, unit: int, steps: Sequence[int]) -> Tensor:
        """[C, N, N] products of the features of `steps`, the latest first and none further back than the window."""
        table = self.products[unit]
        pairs = [[table[max(i, j), abs(i - j)] for j in steps] for i in steps]
        return torch.stack([torch.stack(row) for row in pairs]).permute(2, 0, 1)


def _channels(y: Tensor) -> Tensor:
    """[C, N] of [B, C, ...] or [..., C]."""
    return (y.movedim(1, 0) if y.ndim >= IMAGE else y.movedim(-1, 0)).flatten(1).float().contiguous()
