"""How learning went: the loss of the batches it saw, and how far whole runs from held-out noise end from the original's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .charts import LABELS, Curve, Plot, Tick, nice, strips, value_axis
from .formatting import scientific

NAMES = {"evaluation": "held out", "loss": "batch"}
"""What is drawn, and how the page calls it."""

Evaluation = Mapping[str, float]
"""`iteration`, `loss` and `evaluation`."""


@dataclass(frozen=True)
class Learning:
    """What the page shows of it."""

    plot: Plot | None
    """None where no loss is finite."""
    evaluation: list[tuple[str, str]]
    """First, best and last, each with its iteration."""


def learning(history: Sequence[Evaluation]) -> Learning | None:
    """`history` as a chart and in words. None where nothing was learned."""
    return Learning(_plot(history), _evaluations(history)) if history else None


def _plot(history: Sequence[Evaluation]) -> Plot | None:
    known = {key: [evaluated for evaluated in history if math.isfinite(evaluated[key])] for key in NAMES}
    values = [evaluated[key] for key, own in known.items() for evaluated in own]
    if not values:
        return None
    axis = value_axis(values)
    last = history[-1]["iteration"]
    curves = [
        Curve([(100 * evaluated["iteration"] / last, axis.below_top(evaluated[key])) for evaluated in known[key]], name)
        for key, name in NAMES.items()
        if known[key]
    ]
    places = [100 * evaluated["iteration"] / last for evaluated in history]
    return Plot(curves, _ticks(last), axis.ticks, axis.logarithmic, strips(places, [_words(j) for j in history]))


def _ticks(last: float) -> list[Tick]:
    """Round iterations from 0 up to the last."""
    every = math.ceil(nice(last / LABELS))
    return [Tick(100 * iteration / last, f"{iteration:,}") for iteration in range(0, math.floor(last) + 1, every)]


def _words(evaluated: Evaluation) -> str:
    losses = ", ".join(f"{name} {scientific(evaluated[key])}" for key, name in NAMES.items())
    return f"iteration {evaluated['iteration']:,.0f}: {losses}"


def _evaluations(history: Sequence[Evaluation]) -> list[tuple[str, str]]:
    best = min(
        history,
        key=lambda evaluated: evaluated["evaluation"] if math.isfinite(evaluated["evaluation"]) else math.inf,
    )
    named = {"first": history[0], "best": best, "last": history[-1]}
    return [
        (f"{name}, iteration {evaluated['iteration']:,.0f}", scientific(evaluated["evaluation"]))
        for name, evaluated in named.items()
    ]
