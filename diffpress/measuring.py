"""Two pipelines beside each other, and no more of them in memory at a time than fit."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from diffpress.calibration.conditions import Condition
from diffpress.calibration.cost import (
    SPARE,
    free_bytes,
    latencies_ms,
    macs_per_image,
    median_ratio,
    parameter_count,
    peak_memory_bytes,
    weight_bytes,
)
from diffpress.calibration.sampling import Sampling, denoiser_of, sample
from diffpress.calibration.trajectory import Progress

from .pairs import Pairs, Side, pairs_of, sample_side

REPEATS = 5

Open = Callable[[], Any]
"""Loads a pipeline."""


def measure(
    reference: Open,
    candidate: Open,
    wanted_of: Callable[[Any], Sequence[Condition]],
    sampling: Sampling,
    progress: Progress | None = None,
) -> tuple[Pairs, dict[str, Any]]:
    """The pairs of both under `wanted_of(pipeline)`, and what an image of each costs.

    Both are timed in alternation where both fit into memory; where they do not, the reference is dropped before the
    candidate is loaded, and each is timed alone.
    """
    # What was dropped before goes now.
    gc.collect()
    first = reference()
    wanted = list(wanted_of(first))
    ours = _alone(first, wanted, sampling, _half(progress, 0))
    if both_fit(first, ours.cost["peak_memory_bytes"]):
        second = candidate()
        theirs = _alone(second, wanted, sampling, _half(progress, 1))
        times = _times((first, second), wanted, sampling)
    else:
        times = _times((first,), wanted, sampling)
        del first
        gc.collect()
        second = candidate()
        theirs = _alone(second, wanted, sampling, _half(progress, 1))
        times += _times((second,), wanted, sampling)
    cost = {key: {"reference": ours.cost[key], "candidate": theirs.cost[key]} for key in ours.cost}
    return pairs_of(ours.side, theirs.side, wanted), {**cost, "latency_ms": _latency(times)}


def _times(pipelines: Sequence[Any], wanted: Sequence[Condition], sampling: Sampling) -> list[list[float]]:
    """What the first image takes each of the `pipelines`, which have made it before."""
    return latencies_ms([partial(sample, own, wanted[:1], sampling) for own in pipelines], REPEATS, warm=True)


def both_fit(reference: Any, needed_bytes: int) -> bool:
    """Whether a pipeline that takes `needed_bytes` at its peak, as `reference` does, can be loaded beside it."""
    return needed_bytes <= SPARE * (free_bytes(reference) - weight_bytes(reference))


class _Alone(NamedTuple):
    """What is measured of one pipeline without the other."""

    side: Side
    cost: dict[str, int]


def _alone(pipeline: Any, wanted: Sequence[Condition], sampling: Sampling, progress: Progress | None) -> _Alone:
    return _Alone(
        sample_side(pipeline, wanted, sampling, progress),
        {
            "parameters": parameter_count(denoiser_of(pipeline)),
            "macs_per_image": macs_per_image(pipeline, wanted[0], sampling),
            "peak_memory_bytes": peak_memory_bytes(pipeline, wanted[0], sampling),
        },
    )


def _latency(times: list[list[float]]) -> dict[str, float]:
    reference, candidate = times
    middle = len(reference) // 2
    return {
        "reference": sorted(reference)[middle],
        "candidate": sorted(candidate)[middle],
        "ratio": median_ratio(candidate, reference),
    }


def _half(progress: Progress | None, side: int) -> Progress | None:
    """The progress of one side of two."""
    if progress is None:
        return None
    return lambda done, total: progress(side * total + done, 2 * total)
