"""One part to one ONNX file."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, IdentityEliminationPass, RemoveUnusedNodesPass

from ..engines.engine import Form
from .part import Part
from .passes import passes_for
from .trace import Place, Traced, trace


def write_graph(part: Part, folder: Path, form: Form) -> list[Place]:
    """Trace a part and write `NAME.onnx` with all its weights in `NAME.onnx.data`; returns where its pieces lie in it.

    Raises UnsupportedModelError where torch cannot trace it.
    """
    traced = trace(part)
    for step in passes_for(form):
        step(traced.model)
    places = _hide_pieces_(traced)
    ClearMetadataAndDocStringPass()(traced.model)
    # Everything is external from the first byte on: one place to look for weights.
    ir.save(traced.model, folder / f"{part.name}.onnx", external_data=f"{part.name}.onnx.data")
    return places


def _hide_pieces_(traced: Traced) -> list[Place]:
    """Take the pieces' values from the outputs; they keep their names, by which a check finds them in the file."""
    model = traced.model
    own, *others = model.graph.outputs
    values = {own.name: own} | {value.name: _without_copies(value) for value in others}
    del model.graph.outputs[1:]
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
