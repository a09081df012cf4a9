"""One part to one ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, IdentityEliminationPass, RemoveUnusedNodesPass

from ..engines.engine import Form
from .part import Part
from .passes import passes_for
from .trace import Place, Traced, trace

LARGE = 256
"""Bytes up to which a tensor stands in the graph itself, as `onnx_ir.save` has it."""


def write_graph(part: Part, folder: Path, form: Form) -> list[Place]:
    """Trace a part and write `NAME.onnx` with all its weights in `NAME.onnx.data`; returns where its pieces lie in it.

    Raises UnsupportedModelError where torch cannot trace it.
    """
    model, places = simplified(part, form)
    # Everything is external from the first byte on: one place to look for weights.
    ir.save(model, folder / f"{part.name}.onnx", external_data=f"{part.name}.onnx.data")
    return places


def write_sharing(models: Mapping[str, ir.Model], folder: Path, data: str) -> None:
    """Write `NAME.onnx` for each of `models`, copies of one, with all their weights once in the file `data`."""
    values = [value for model in models.values() for value in model.graph.initializers.values()]
    large = {id(value.const_value): value.const_value for value in values if value.const_value.nbytes > LARGE}
    stored = ir.external_data.convert_tensors_to_external(list(large.values()), folder, data)
    places = dict(zip(large, stored, strict=True))
    for value in values:
        value.const_value = places.get(id(value.const_value), value.const_value)
    for name, model in models.items():
        ir.save(model, folder / f"{name}.onnx")


def simplified(part: Part, form: Form) -> tuple[ir.Model, list[Place]]:
    """The graph of a part as it is written, and where its pieces lie in it. Raises as `write_graph` does."""
    traced = trace(part, form)
    for step in passes_for(form):
        step(traced.model)
    places = _hide_pieces_(traced, len(part.outputs))
    ClearMetadataAndDocStringPass()(traced.model)
    return traced.model, places


def _hide_pieces_(traced: Traced, count: int) -> list[Place]:
    """Take the pieces' values from the outputs; they keep their names, by which a check finds them in the file."""
    model = traced.model
    values = {value.name: _without_copies(value) if place else value for place, value in enumerate(model.graph.outputs)}
    del model.graph.outputs[count:]
    IdentityEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    return [
        Place(piece, tuple(str(values[name].name) for name in inputs), str(values[output].name))
        for piece, inputs, output in traced.places
    ]


def _without_copies(value: ir.Value) -> ir.Value:
    """Values that are two outputs of a trace at once come as copies of one."""
    node = value.producer()
    while node is not None and node.op_type == "Identity":
        value = node.inputs[0]
        node = value.producer()
    return value
