"""A graph in which units answer by forecasts of what they computed at earlier steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ...portable.manifest import CORRECTION, FORECAST
from ..features import Feature


class ForecastFeatures(ir.passes.InPlacePass):
    """Put forecasts in the places of features.

    1. Where a feature is added to something, a unit's sum is that and the forecast: what it is added to stays fresh.
    2. Where it is all that a unit gives, so is the forecast.
    3. Past features in integers are multiplied by their scales first.
    4. Features are outputs no more, and nodes and inputs go that only they needed.
    """

    def __init__(self, features: Sequence[Feature], units: int) -> None:
        """`units`: how many rows the weights of forecasts have."""
        super().__init__()
        self.features, self.units = features, units
        self.replaced: set[str] = set()
        """Names of values that were computed before, and are forecast now."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if not self.features:
            return ir.passes.PassResult(model, False)
        graph, names = model.graph, {own.name for own in self.features}
        outputs = {value.name: value for value in graph.outputs}
        graph.outputs[:] = [value for value in graph.outputs if value.name not in names]
        writer = _Writer(graph, self.units)
        for feature in self.features:
            self.replaced.add(writer.replace_(feature, outputs[feature.name]))
        RemoveUnusedNodesPass()(model)
        graph.inputs[:] = [value for value in graph.inputs if value.uses() or value.name not in writer.added]
        return ir.passes.PassResult(model, True)


class _Writer:
    """Nodes of forecasts into one graph."""

    def __init__(self, graph: ir.Graph, units: int) -> None:
        self.graph, self.units = graph, units
        self.added: dict[str, ir.Value] = {}
        self.place: ir.Node | None = None

    def replace_(self, feature: Feature, value: ir.Value) -> str:
        """Have all who look at what the unit gives look at the forecast, with what it is added to; returns its name."""
        made = _made(value)
        assert not feature.added or made.op_type == "Sub", f"{feature.name} is made by {made.op_type}"
        given, identity = made.inputs if feature.added else (made.outputs[0], None)
        assert given is not None
        self.place = given.producer()
        forecast = self._forecast(feature, value)
        # An input of the graph keeps its name.
        answer = self._node("Identity", forecast) if identity is None else self._node("Add", identity, forecast)
        answer.shape, answer.type = given.shape, given.type
        given.replace_all_uses_with(answer, replace_graph_outputs=True)
        # By its name outputs of the graph are asked for, and pieces find what they are given.
        given.name, answer.name = f"{given.name}.computed", given.name
        return str(answer.name)

    def _forecast(self, feature: Feature, value: ir.Value) -> ir.Value:
        """p1 + sum of w_k (p_k - p1), by the scale and the shift of the row."""
        first = made = self._past(feature, 1, value)
        for count in range(1, feature.kept):
            weights = self._input(FORECAST, (self.units, feature.kept), ir.DataType.FLOAT)
            place = self._constant(f"weight.{feature.unit}.{count}", np.array([feature.unit, count]))
            change = self._node("Sub", self._past(feature, count + 1, value), first)
            made = self._node("Add", made, self._node("Mul", self._node("GatherND", weights, place), change))
        if feature.tables is None:
            return made
        scale, shift = feature.tables
        scaled = self._node("Mul", made, self._row(f"{feature.name}.table0", scale))
        return self._node("Add", scaled, self._row(f"{feature.name}.table1", shift))

    def _past(self, feature: Feature, count: int, value: ir.Value) -> ir.Value:
        if feature.storage != "int8":
            return self._input(feature.past(count), value.shape, ir.DataType.FLOAT)
        codes = self._input(feature.past(count), value.shape, ir.DataType.INT8)
        scale = self._input(f"{feature.scale}.past{count}", (), ir.DataType.FLOAT)
        return self._node("Mul", self._node("Cast", codes, to=ir.DataType.FLOAT), scale)

    def _row(self, name: str, table: NDArray[np.float16]) -> ir.Value:
        row = self._input(CORRECTION, (), ir.DataType.INT64)
        return self._node("Cast", self._node("Gather", self._constant(name, table), row, axis=0), to=ir.DataType.FLOAT)

    def _input(self, name: str, shape: ir.Shape | tuple[int, ...] | None, dtype: ir.DataType) -> ir.Value:
        if name not in self.added:
            self.added[name] = ir.Value(name=name, shape=ir.Shape(shape or ()), type=ir.TensorType(dtype))
            self.graph.inputs.append(self.added[name])
        return self.added[name]

    def _constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        if name not in self.graph.initializers:
            tensor = ir.tensor(array, name=name)
            value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _node(self, operator: str, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
        assert self.place is not None
        node = ir.node(operator, inputs, attributes)
        self.graph.insert_before(self.place, node)
        return node.outputs[0]


def _made(value: ir.Value) -> ir.Node:
    """The node behind copies, which tracing makes where two outputs are one value."""
    node = value.producer()
    assert node is not None
    while node.op_type == "Identity":
        (source,) = node.inputs
        assert source is not None
        node = source.producer()
        assert node is not None
    return node
