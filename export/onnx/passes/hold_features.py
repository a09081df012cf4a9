"""Features that leave a graph as they are held between steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...runtime import INT8_MAX
from ..features import Feature


class HoldFeatures(ir.passes.InPlacePass):
    """Round features on their way out, where they are not held as they were computed.

    1. int8: codes take the place of the feature, with one scale, of the largest magnitude, behind them.
    2. bfloat16: floats of its precision, which is what engines can give to numpy.
    """

    def __init__(self, features: Sequence[Feature]) -> None:
        super().__init__()
        self.features = {own.name: own for own in features if own.storage != "computed"}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        outputs: list[ir.Value] = []
        for value in model.graph.outputs:
            feature = self.features.get(str(value.name))
            outputs += [value] if feature is None else _held(model.graph, feature, value)
        model.graph.outputs[:] = outputs
        return ir.passes.PassResult(model, bool(self.features))


def _held(graph: ir.Graph, feature: Feature, value: ir.Value) -> list[ir.Value]:
    value.name = f"{feature.name}.computed"
    if feature.storage == "bfloat16":
        rounded = _cast(graph, _cast(graph, value, ir.DataType.BFLOAT16), ir.DataType.FLOAT)
        rounded.name, rounded.shape = feature.name, value.shape
        return [rounded]
    tiny, most = _constant(graph, "tiny", float(np.finfo(np.float32).tiny)), _constant(graph, "largest_code", INT8_MAX)
    largest = _node(graph, "ReduceMax", _node(graph, "Abs", value), keepdims=0)
    scale = _node(graph, "Max", _node(graph, "Div", largest, most), tiny)
    codes = _cast(graph, _node(graph, "Round", _node(graph, "Div", value, scale)), ir.DataType.INT8)
    codes.name, codes.shape = feature.name, value.shape
    scale.name, scale.shape, scale.type = feature.scale, ir.Shape(()), ir.TensorType(ir.DataType.FLOAT)
    return [codes, scale]


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    made = _node(graph, "Cast", value, to=dtype)
    made.type = ir.TensorType(dtype)
    return made


def _constant(graph: ir.Graph, name: str, number: float) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(number, np.float32), name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def _node(graph: ir.Graph, operator: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
    node = ir.node(operator, inputs, attributes)
    graph.append(node)
    return node.outputs[0]
