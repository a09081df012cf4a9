"""Figures laid out in percent of their box, so that the page draws them at any width with text at its own size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .formatting import TIMES, scientific, significant
from .images import spread

LOGARITHMIC = 30
"""Values that span more than this factor are drawn on a logarithmic axis."""
LABELS = 6
BINS = 8
NARROWEST_DB = 0.1
NARROWEST = 1e-3
"""Between marks, at the least and over the largest value: equal values are no reason for many digits."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis, at a share of its length in percent."""

    at: float
    text: str
    below: str = ""


@dataclass(frozen=True)
class Axis:
    """From `low` at the bottom to `high` at the top, with a mark at each of `values`."""

    low: float
    high: float
    values: list[float]
    logarithmic: bool

    def below_top(self, value: float) -> float:
        """Where `value` lies, from the top, in percent."""
        place = math.log10 if self.logarithmic else float
        bottom, top = place(self.low), place(self.high)
        return 100 - 100 * (place(max(value, self.low)) - bottom) / (top - bottom)

    @property
    def ticks(self) -> list[Tick]:
        """The marks, the lowest first."""
        return [Tick(self.below_top(value), _tick_words(value)) for value in self.values]


@dataclass(frozen=True)
class Curve:
    """One line; each point from the left and from the top, in percent."""

    points: list[tuple[float, float]]
    name: str = ""

    @property
    def path(self) -> str:
        """The line as SVG path data in a box of 100 by 100."""
        return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in self.points)

    @property
    def dots(self) -> str:
        """A line of no length at every point, which round caps make a dot."""
        return "".join(f"M{x:.2f} {y:.2f}h0" for x, y in self.points)


@dataclass(frozen=True)
class Strip:
    """The part of the width, in percent, where the reader is told `text`."""

    start: float
    width: float
    text: str


@dataclass(frozen=True)
class Plot:
    """Curves over one pair of axes, the one that matters most first."""

    curves: list[Curve]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    logarithmic: bool
    strips: list[Strip]


@dataclass(frozen=True)
class Bar:
    """How many values lie between two edges; `height` in percent of the tallest."""

    count: int
    height: float
    text: str


@dataclass(frozen=True)
class Histogram:
    """Counts in bins of equal width."""

    bars: list[Bar]
    ticks: list[Tick]


def step_curve(errors: Sequence[float], timesteps: Sequence[float]) -> Plot | None:
    """`errors` against the step, with time steps where there is one for each. None where nothing is finite."""
    known = timesteps if len(timesteps) == len(errors) else []
    finite = [(step, error) for step, error in enumerate(errors) if math.isfinite(error)]
    if not finite:
        return None
    axis = value_axis([error for _, error in finite])
    points = [(_across(step, len(errors)), axis.below_top(error)) for step, error in finite]
    labels = [_step_tick(step, len(errors), known) for step in spread(len(errors), LABELS)]
    texts = [_point_words(step, error, known) for step, error in finite]
    return Plot([Curve(points)], labels, axis.ticks, axis.logarithmic, strips([x for x, _ in points], texts))


def value_axis(values: Sequence[float]) -> Axis:
    """For finite `values` from 0 on: logarithmic where they span more than LOGARITHMIC, else from zero."""
    positive = [value for value in values if value > 0]
    logarithmic = bool(positive) and max(positive) / min(positive) > LOGARITHMIC
    low, high, marks = _decades(positive) if logarithmic else _from_zero(max(values))
    return Axis(low, high, marks, logarithmic)


def close_axis(values: Sequence[float]) -> Axis:
    """For finite `values` of which differences matter: linear, with round ends close around them."""
    step = nice(max((max(values) - min(values)) / 4, NARROWEST * abs(max(values)), NARROWEST))
    first, last = math.floor(min(values) / step + 1e-9), math.ceil(max(values) / step - 1e-9)
    marks = [step * i for i in range(first, max(last, first + 1) + 1)]
    return Axis(marks[0], marks[-1], marks, False)


def strips(places: Sequence[float], texts: Sequence[str]) -> list[Strip]:
    """Around each of the rising `places` a strip that reaches half the way to its neighbours."""
    middles = [(left + right) / 2 for left, right in pairwise(places)]
    if not middles:
        return [Strip(0, 100, text) for text in texts]
    edges = [2 * places[0] - middles[0], *middles, 2 * places[-1] - middles[-1]]
    return [Strip(start, end - start, text) for (start, end), text in zip(pairwise(edges), texts, strict=True)]


def histogram(values: Sequence[float]) -> Histogram | None:
    """`values` in about BINS bins with round edges. None where nothing is finite."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    width = nice(max((max(finite) - min(finite)) / BINS, NARROWEST_DB))
    first = math.floor(min(finite) / width)
    places = [math.floor(value / width) - first for value in finite]
    counts = [places.count(place) for place in range(max(places) + 1)]
    edges = [_edge_words((first + i) * width, width) for i in range(len(counts) + 1)]
    bars = [
        Bar(count, 100 * count / max(counts), f"{count} from {edges[i]} to {edges[i + 1]} dB")
        for i, count in enumerate(counts)
    ]
    every = math.ceil(len(edges) / LABELS)
    return Histogram(bars, [Tick(100 * i / len(counts), edges[i]) for i in range(0, len(edges), every)])


def nice(value: float) -> float:
    """The next of 1, 2, 2.5, 5, or one of these times a power of ten, at or above `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * (1 - 1e-9))


def step_words(step: int, timesteps: Sequence[float]) -> str:
    """Which step it is, with its time step where those are known."""
    return f"step {step + 1} (time step {significant(timesteps[step])})" if timesteps else f"step {step + 1}"


def _edge_words(value: float, width: float) -> str:
    """A bin's edge with as many places as its width needs."""
    return f"{value:.{len(f'{width:g}'.partition('.')[2])}f}"


def _across(step: int, count: int) -> float:
    return 50.0 if count == 1 else 100 * step / (count - 1)


def _from_zero(highest: float) -> tuple[float, float, list[float]]:
    step = nice(highest / 4) if highest > 0 else 1.0
    count = max(1, math.ceil(highest / step - 1e-9))
    return 0.0, step * count, [step * i for i in range(count + 1)]


def _decades(values: Sequence[float]) -> tuple[float, float, list[float]]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    every = math.ceil((high - low) / LABELS)
    return 10.0**low, 10.0**high, [10.0**power for power in range(low, high + 1, every)]


def _tick_words(value: float) -> str:
    text = scientific(value)
    return text.replace(f".0 {TIMES}", f" {TIMES}") if TIMES in text else f"{value:g}"


def _point_words(step: int, value: float, timesteps: Sequence[float]) -> str:
    return f"{step_words(step, timesteps)}: {scientific(value)}"


def _step_tick(step: int, count: int, timesteps: Sequence[float]) -> Tick:
    return Tick(_across(step, count), str(step + 1), f"{timesteps[step]:g}" if timesteps else "")
