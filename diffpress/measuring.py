"""Two pipelines beside each other, and no more of them in memory at a time than fit."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from diffpress.calibration.layer_uses import layer_uses
from diffpress.calibration.sampling import Sampling, denoisers_of, device_of_pipeline, sample
from diffpress.calibration.trajectory import Progress
from diffpress.export.runtime import Expansion, LayerUse, expand_
from diffpress.kernels.answering import machine_words

from .pairs import Pairs, Side, pairs_of, sample_side

REPEATS = 5

Open = Callable[[], Any]
"""Loads a pipeline."""


@dataclass(frozen=True)
class Measured:
    """Two pipelines beside each other."""

    pairs: Pairs
    """Of layers that are all packed, so that they depend on seeds alone."""
    cost: dict[str, Any]
    """What an image costs, of pipelines as `diffpress.load` leaves them: packed layers that are slower than floats expanded."""
    packed: dict[str, Any]
    """`latency_ms` and `peak_memory_bytes` where every layer stays packed; empty where none was expanded."""
    uses: dict[str, LayerUse]
    """What the candidate's packed layers were given."""
    expansion: Expansion
    """What became of them."""
    machine: str
    """What the times hold for."""


def measure(
    reference: Open,
    candidate: Open,
    conditions_of: Callable[[Any], Sequence[Condition]],
    sampling: Sampling,
    progress: Progress | None = None,
) -> Measured:
    """The pairs of both under `conditions_of(pipeline)`, and what an image of each costs.

    Both are timed in alternation where both fit into memory; where they do not, the reference is dropped before the
    candidate is loaded, and each is timed alone.
    """
    # What was dropped before goes now.
    gc.collect()
    first = reference()
    conditions = list(conditions_of(first))
    machine = machine_words(str(device_of_pipeline(first)))
    ours = alone(first, conditions, sampling, _half(progress, 0))
    if both_fit(first, ours.cost["peak_memory_bytes"]):
        second = candidate()
        theirs = alone(second, conditions, sampling, _half(progress, 1))
        timed = _timed({first: ours, second: theirs}, conditions, sampling)
    else:
        timed = _timed({first: ours}, conditions, sampling)
        del first
        gc.collect()
        second = candidate()
        theirs = alone(second, conditions, sampling, _half(progress, 1))
        timed = timed.beside(_timed({second: theirs}, conditions, sampling))
    cost: dict[str, Any] = {key: _both(ours.cost[key], theirs.cost[key]) for key in ours.cost}
    packed = {"peak_memory_bytes": cost["peak_memory_bytes"], "latency_ms": _latency(timed.packed)}
    loaded = {"peak_memory_bytes": _both(*timed.peaks), "latency_ms": _latency(timed.loaded)}
    return Measured(
        pairs_of(ours.side, theirs.side, conditions),
        cost | loaded,
        packed if any(own.expanded for own in timed.expansions) else {},
        theirs.uses,
        timed.expansions[1],
        machine,
    )


class _Timed(NamedTuple):
    """Of one pipeline or two, in order."""

    packed: list[list[float]]
    """Times of an image while all layers are packed."""
    loaded: list[list[float]]
    """And once those that are faster in floats are expanded."""
    peaks: list[int]
    """Memory, then."""
    expansions: list[Expansion]

    def beside(self, other: _Timed) -> _Timed:
        """Of the pipelines of both."""
        return _Timed(
            self.packed + other.packed,
            self.loaded + other.loaded,
            self.peaks + other.peaks,
            self.expansions + other.expansions,
        )


def _timed(pipelines: Mapping[Any, Alone], conditions: Sequence[Condition], sampling: Sampling) -> _Timed:
    """Times in alternation of pipelines, of which each has been measured alone; their layers are left expanded."""
    packed = _times(list(pipelines), conditions, sampling)
    expansions = [expand_(pipeline, alone.uses) for pipeline, alone in pipelines.items()]
    peaks = [
        peak_memory_bytes(pipeline, conditions[0], sampling) if expansion.expanded else alone.cost["peak_memory_bytes"]
        for (pipeline, alone), expansion in zip(pipelines.items(), expansions, strict=True)
    ]
    changed = any(expansion.expanded for expansion in expansions)
    return _Timed(packed, _times(list(pipelines), conditions, sampling) if changed else packed, peaks, expansions)


def _both(reference: Any, candidate: Any) -> dict[str, Any]:
    return {"reference": reference, "candidate": candidate}


def _times(pipelines: Sequence[Any], conditions: Sequence[Condition], sampling: Sampling) -> list[list[float]]:
    """What the first image takes each of the `pipelines`, which have made it before."""
    return latencies_ms([partial(sample, own, conditions[:1], sampling) for own in pipelines], REPEATS, warm=True)


def both_fit(reference: Any, needed_bytes: int) -> bool:
    """Whether a pipeline that takes `needed_bytes` at its peak, as `reference` does, can be loaded beside it."""
    return needed_bytes <= SPARE * (free_bytes(reference) - weight_bytes(reference))


class Alone(NamedTuple):
    """What is measured of one pipeline without the other."""

    side: Side
    cost: dict[str, int]
    uses: dict[str, LayerUse]
    """Of one image."""


def alone(pipeline: Any, conditions: Sequence[Condition], sampling: Sampling, progress: Progress | None) -> Alone:
    """Measure one pipeline, all of whose layers are packed."""
    side = sample_side(pipeline, conditions, sampling, progress)
    with layer_uses(pipeline) as uses:
        macs = macs_per_image(pipeline, conditions[0], sampling)
    cost = {
        "parameters": sum(map(parameter_count, denoisers_of(pipeline).values())),
        "macs_per_image": macs,
        "peak_memory_bytes": peak_memory_bytes(pipeline, conditions[0], sampling),
    }
    return Alone(side, cost, uses)


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
