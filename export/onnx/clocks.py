"""The one place where the exporter looks at the step that packed layers are at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..runtime import PackedLayer, StepClock
from .part import packed_layers

EPSILON = 2.0**-23
"""Two roundings of float32, one of each engine."""


def scale_now(layer: PackedLayer) -> Tensor:
    """The scale [1] of a layer's input at the current step."""
    assert layer.clock is not None
    assert layer.activation_scale is not None
    return layer.clock.select(layer.activation_scale)


def zero_now(layer: PackedLayer) -> Tensor | None:
    """The code [1] of 0, where it is another than 0."""
    return None if layer.zero_point is None or layer.clock is None else layer.clock.select_code(layer.zero_point)


def scale_rounding(layer: PackedLayer) -> float:
    """Relative rounding of `scale_now`: none at a step that the scales were made for.

    Between two, the position is a sum over all steps, each rounded, and a scale is at most twice the one beside it.
    """
    if layer.clock is None or float(layer.clock.weights.max()) == 1:
        return 0.0
    return len(layer.clock.timesteps) ** 2 * EPSILON


@contextmanager
def clocks_kept(module: nn.Module) -> Iterator[None]:
    """Tracing moves the clocks with tensors that stand for no value; put the real ones back."""
    clocks: list[StepClock] = [layer.clock for layer in packed_layers(module) if layer.clock is not None]
    before = [clock.weights for clock in clocks]
    try:
        yield
    finally:
        for clock, weights in zip(clocks, before, strict=True):
            clock.weights = weights
