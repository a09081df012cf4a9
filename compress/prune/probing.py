"""Which columns of a layer's input are units: the gradient of one says which rows of other layers have a part in it.

Columns whose rows nobody else has a part in are a unit: a head, a neuron, or the channels that a norm takes together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .structures import Part, Span
from .tracing import Source, Traced, channels

CHECKED = 4
"""Units of a structure that gradients are looked at for."""


class NoUnitsError(Exception):
    """Why columns of a layer cannot be removed."""


@dataclass(frozen=True)
class Columns:
    """Neighbouring columns of a layer that are units of one kind, and the rows of each unit."""

    reader: Part
    count: int
    rows: dict[int, tuple[Span, ...]]
    """By the identity of the source."""

    def shares_rows_with(self, other: Columns) -> bool:
        """Whether any row is of a unit of both."""
        return any(self._all(leaf) & other._all(leaf) for leaf in self.rows.keys() & other.rows.keys())

    def _all(self, leaf: int) -> set[int]:
        return {place for span in self.rows[leaf] for place in range(span.start, span.start + span.width * self.count)}


def columns_of(trace: Traced, name: str, sources: Sequence[Source]) -> Iterator[Columns]:
    """The columns of one layer, in pieces of one kind of units."""
    probe = _Probe(trace.inputs[name][0], channels(trace.model, name), sources)
    first, width = 0, trace.inputs[name][0].shape[probe.dimension]
    while first < width:
        last = probe.last_alike(first, width - 1)
        yield _units(name, probe, first, last)
        first = last + 1


def _units(name: str, probe: _Probe, first: int, last: int) -> Columns:
    """As many units as the rows between those of the first and of the last column allow."""
    low, high = probe.rows(range(first, first + 1)), probe.rows(range(last, last + 1))
    if [(leaf, len(runs)) for leaf, runs in low.items()] != [(leaf, len(runs)) for leaf, runs in high.items()]:
        raise NoUnitsError("its columns are made of different things")
    # What all units share, as the norm of every head, belongs to none.
    moving = [leaf for leaf in low if not (probe.sources[leaf].parameter and low[leaf] == high[leaf])]
    pairs = {leaf: list(zip(low[leaf], high[leaf], strict=True)) for leaf in moving}
    totals = {leaf: [b.start + b.width - a.start for a, b in own] for leaf, own in pairs.items()}
    counts = [total / a.width for leaf in moving for total, (a, _) in zip(totals[leaf], pairs[leaf], strict=True)]
    count = int(min(counts, default=1))
    if count < 2 or any(total % count for total in (last + 1 - first, *(t for own in totals.values() for t in own))):
        raise NoUnitsError("no two of its columns are apart")
    rows = {
        leaf: tuple(Span(a.start, total // count) for total, (a, _) in zip(totals[leaf], pairs[leaf], strict=True))
        for leaf in moving
    }
    columns = Columns(Part(name, (Span(first, (last + 1 - first) // count),)), count, rows)
    _check_units(probe, columns)
    return columns


def _check_units(probe: _Probe, columns: Columns) -> None:
    """What units are made of is theirs alone."""
    count, (span,) = columns.count, columns.reader.spans
    for unit in sorted({0, count - 1, *(count * part // CHECKED for part in range(1, CHECKED))}):
        for leaf, runs in probe.rows(span.of(unit)).items():
            own = {place for part in columns.rows.get(leaf, ()) for place in part.of(unit)}
            if leaf in columns.rows and not {place for run in runs for place in run.of(0)} <= own:
                raise NoUnitsError("no two of its columns are apart")


class _Probe:
    """Gradients of columns of one layer's input."""

    def __init__(self, x: Tensor, dimension: int, sources: Sequence[Source]) -> None:
        self.x, self.dimension = x, dimension % x.ndim
        self.sources = {id(source.leaf): source for source in sources}
        self.generator = torch.Generator().manual_seed(0)

    def rows(self, columns: range) -> dict[int, tuple[Span, ...]]:
        """Runs of places that have a part in these columns, by the sources they are of."""
        seed = torch.zeros_like(self.x)
        place = seed.narrow(self.dimension, columns.start, len(columns))
        place.copy_(torch.randn(place.shape, generator=self.generator))
        leaves = [source.leaf for source in self.sources.values()]
        gradients = torch.autograd.grad(self.x, leaves, seed, retain_graph=True, allow_unused=True)
        found = {}
        for (leaf, source), gradient in zip(self.sources.items(), gradients, strict=True):
            runs = () if gradient is None else _runs(gradient, source.dimension)
            if runs:
                found[leaf] = runs
        return found

    def last_alike(self, first: int, last: int) -> int:
        """The last column up to which all are made as the `first` one is."""
        wanted = self._signature(first)
        if self._signature(last) == wanted:
            return last
        low, high = first, last
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._signature(middle) == wanted else (low, middle)
        return low

    def _signature(self, column: int) -> dict[int, tuple[int, ...]]:
        found = self.rows(range(column, column + 1))
        return {leaf: tuple(run.width for run in runs) for leaf, runs in found.items()}


def _runs(gradient: Tensor, dimension: int) -> tuple[Span, ...]:
    """Neighbouring places along `dimension` at which there is any gradient."""
    reached = gradient.movedim(dimension, 0).reshape(gradient.shape[dimension], -1).ne(0).any(1)
    places = reached.nonzero()[:, 0].tolist()
    runs: list[Span] = []
    for place in places:
        if runs and place == runs[-1].start + runs[-1].width:
            runs[-1] = Span(runs[-1].start, runs[-1].width + 1)
        else:
            runs.append(Span(place, 1))
    return tuple(runs)
