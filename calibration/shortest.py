"""The shortest run that a pipeline makes, to tell from it what a whole one takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .conditions import Condition
from .sampling import Call, Sampling, sample, watch

FEWEST = (2, 3, 4, 6, 8)
"""Steps that are tried: the second shows what the first is not to be blamed for; some schedulers cannot make so few."""


def shortest(pipeline: Any, condition: Condition, sampling: Sampling) -> Sampling:
    """`sampling` with the fewest steps that the pipeline makes, two at least; `sampling` itself where it makes no fewer."""
    for steps in FEWEST:
        if sampling.steps is not None and steps >= sampling.steps:
            break
        fewer = replace(sampling, steps=steps)
        try:
            sample(pipeline, [condition], fewer)
        # Whatever a scheduler or a pipeline says to a number of steps that it cannot make.
        except Exception:
            continue
        return fewer
    return sampling


def short_run(pipeline: Any, condition: Condition, sampling: Sampling) -> list[Call]:
    """The denoiser's calls in the shortest run of one image."""
    calls: list[Call] = []
    few = shortest(pipeline, condition, sampling)
    with watch(pipeline, calls.append):
        sample(pipeline, [condition], few)
    return calls
