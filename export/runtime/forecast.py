"""A feature from earlier ones: sums of a few tensors, which take as long as memory takes to read and write them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IMAGE = 4
"""Axes from which on a feature is a map, whose channels are the second; others have them last."""


def forecast(x: Tensor | None, weights: Sequence[Tensor], past: Sequence[Tensor], correction: Tensor | None) -> Tensor:
    """`x`, where there is something to add to, and the sum of `past` by `weights` that make one, corrected.

    `correction` [2, C] multiplies channels of the sum, and is added to it. `past` stays as it is.
    """
    y = _combined(weights, past)
    fresh = y is not past[0]
    if correction is not None:
        y, fresh = _corrected(y, correction.to(y.dtype), fresh), True
    if x is None:
        return y
    return y.add_(x) if fresh else x + y


def _combined(weights: Sequence[Tensor], past: Sequence[Tensor]) -> Tensor:
    """A new tensor, but where there is one feature only."""
    first, *rest = past
    if not rest:
        return first
    y = torch.lerp(first, rest[0], weights[1].to(first.dtype))
    for w, other in zip(weights[2:], rest[1:], strict=True):
        y.addcmul_(other - first, w.to(first.dtype))
    return y


def _corrected(y: Tensor, correction: Tensor, fresh: bool) -> Tensor:
    """`y` [..., C] or [B, C, ...], in its own place where it is `fresh`."""
    scale, shift = correction.view(2, -1, *[1] * (y.ndim - 2)) if y.ndim >= IMAGE else correction
    # Not addcmul: on a map it takes three times as long as one after the other in place.
    return (y.mul_(scale) if fresh else y * scale).add_(shift)
