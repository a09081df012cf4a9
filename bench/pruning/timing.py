"""Time that a pipeline spends in its denoiser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from time import perf_counter
from typing import Any

from measure import Run
from torch import nn

from diffpress.calibration.conditions import Condition
from diffpress.calibration.sampling import denoiser_of


def denoiser_ms(runs: Sequence[Run], condition: Condition, repeats: int) -> list[list[float]]:
    """Of one image from each of `runs`, taken in alternation: [run][repeat]; after one image more of each."""
    for run in runs:
        run.draw([condition])
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for own, run in zip(times, runs, strict=True):
            with timed_calls(denoiser_of(run.pipeline)) as calls:
                run.draw([condition])
            own.append(sum(calls))
    return times


@contextmanager
def timed_calls(denoiser: nn.Module) -> Iterator[list[float]]:
    """Milliseconds of every call of the denoiser, one after the other."""
    calls: list[float] = []
    forward = denoiser.forward

    @wraps(forward)
    def timed(*arguments: Any, **options: Any) -> Any:
        start = perf_counter()
        output = forward(*arguments, **options)
        calls.append(1e3 * (perf_counter() - start))
        return output

    denoiser.forward = timed
    try:
        yield calls
    finally:
        denoiser.forward = forward
