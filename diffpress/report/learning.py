"""How learning went: the loss of the batches it saw, and how far whole runs from held-back noise end from the original's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .charts import LABELS, Curve, Plot, Tick, nice, strips, value_axis
from .words import scientific

NAMES = {"held_back": "held back", "loss": "batch"}
"""What is drawn, and how the page calls it."""

Judgement = Mapping[str, float]
"""`iteration`, `loss` and `held_back`."""


@dataclass(frozen=True)
class Learning:
    """What the page shows of it."""

    plot: Plot | None
    """None where no loss is finite."""
    held_back: list[tuple[str, str]]
    """First, best and last, each with its iteration."""


def learning(history: Sequence[Judgement]) -> Learning | None:
    """`history` as a chart and in words. None where nothing was learned."""
    return Learning(_plot(history), _held_back(history)) if history else None


def _plot(history: Sequence[Judgement]) -> Plot | None:
    known = {key: [judged for judged in history if math.isfinite(judged[key])] for key in NAMES}
    values = [judged[key] for key, own in known.items() for judged in own]
    if not values:
        return None
    axis = value_axis(values)
    last = history[-1]["iteration"]
    curves = [
        Curve([(100 * judged["iteration"] / last, axis.below_top(judged[key])) for judged in known[key]], name)
        for key, name in NAMES.items()
        if known[key]
    ]
    places = [100 * judged["iteration"] / last for judged in history]
    return Plot(curves, _ticks(last), axis.ticks, axis.logarithmic, strips(places, [_words(j) for j in history]))


def _ticks(last: float) -> list[Tick]:
    """Round iterations from 0 up to the last."""
    every = math.ceil(nice(last / LABELS))
    return [Tick(100 * iteration / last, f"{iteration:,}") for iteration in range(0, math.floor(last) + 1, every)]


def _words(judged: Judgement) -> str:
    losses = ", ".join(f"{name} {scientific(judged[key])}" for key, name in NAMES.items())
    return f"iteration {judged['iteration']:,.0f}: {losses}"


def _held_back(history: Sequence[Judgement]) -> list[tuple[str, str]]:
    best = min(history, key=lambda judged: judged["held_back"] if math.isfinite(judged["held_back"]) else math.inf)
    named = {"first": history[0], "best": best, "last": history[-1]}
    return [
        (f"{name}, iteration {judged['iteration']:,.0f}", scientific(judged["held_back"]))
        for name, judged in named.items()
    ]
