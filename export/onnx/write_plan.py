"""A denoiser with a step plan to one ONNX file a pattern of rows, over one file of weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..engines.engine import Form
from ..runtime import Inheritance, Row
from .features import Feature, features_of
from .part import Part
from .passes import ForecastFeatures, HoldFeatures
from .planned import planned_part
from .trace import Place
from .write import simplified, write_sharing

Pattern = tuple[bool, ...]
"""Per unit, whether it computes."""


class PlannedGraph(NamedTuple):
    """One of the files."""

    part: Part
    places: list[Place]


class PlannedGraphs(NamedTuple):
    """All of them."""

    graphs: dict[str, PlannedGraph]
    """The first is that in which everything is computed."""
    names: dict[Pattern, str]
    kept: list[Feature]
    """Those that any of the graphs takes up."""


class _Cut(NamedTuple):
    """The graph of one pattern."""

    model: ir.Model
    places: list[Place]


def write_planned(part: Part, inheritance: Inheritance, rows: Iterable[Row], folder: Path, form: Form) -> PlannedGraphs:
    """Write a graph for every pattern of `rows`, the first of which computes everything.

    They are cut out of one trace: where a unit forecasts, what only its computation needed is left out, inputs and kept
    features too. Raises UnsupportedModelError where torch cannot trace it, or a feature cannot be kept.
    """
    patterns = list(dict.fromkeys(row.computes for row in rows))
    features = features_of(part, inheritance)
    bare = [own._replace(storage="computed") for own in features]
    whole = planned_part(part, inheritance, patterns[0], features, bare, (), part.name)
    traced = _Cut(*simplified(whole, form))
    cuts = [_cut(traced, features, pattern) for pattern in patterns]
    taken = {str(value.name) for cut in cuts for value in cut.model.graph.inputs}
    kept = [own for own in features if own.past(1) in taken]
    names = {pattern: part.name if not place else f"{part.name}_{place}" for place, pattern in enumerate(patterns)}
    graphs = {}
    for pattern, cut in zip(patterns, cuts, strict=True):
        given = [own for own in kept if pattern[own.unit]]
        places = _hold_(cut, part, given)
        inputs = _inputs_behind(part, cut.model)
        own = planned_part(part, inheritance, pattern, features, given, inputs, names[pattern])
        graphs[names[pattern]] = PlannedGraph(own, places)
    models = {names[pattern]: cut.model for pattern, cut in zip(patterns, cuts, strict=True)}
    write_sharing(models, folder, f"{part.name}.onnx.data")
    return PlannedGraphs(graphs, names, kept)


def _cut(traced: _Cut, features: Sequence[Feature], pattern: Pattern) -> _Cut:
    """A copy in which the units that `pattern` says so forecast."""
    model = traced.model.clone()
    forecast = ForecastFeatures([own for own in features if not pattern[own.unit]], len(pattern))
    forecast(model)
    return _Cut(model, [place for place in traced.places if place.output not in forecast.replaced])


def _hold_(cut: _Cut, part: Part, given: Sequence[Feature]) -> list[Place]:
    """Give the features that anybody takes up, as they are held; returns where pieces lie then."""
    graph, names = cut.model.graph, {own.name for own in given}
    graph.outputs[:] = [value for value in graph.outputs if value.name in names | {part.output}]
    RemoveUnusedNodesPass()(cut.model)
    hold = HoldFeatures(given)
    hold(cut.model)
    # The name is that of what is held now.
    moved = {name: f"{name}.computed" for name in hold.features}
    values = {value.name for node in graph for value in node.outputs}
    places = (
        Place(piece, tuple(moved.get(name, name) for name in inputs), moved.get(output, output))
        for piece, inputs, output in cut.places
    )
    return [place for place in places if place.output in values]


def _inputs_behind(part: Part, model: ir.Model) -> tuple[str, ...]:
    return tuple(str(value.name) for value in model.graph.inputs[len(part.inputs) :])
