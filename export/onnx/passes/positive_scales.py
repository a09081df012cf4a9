"""Scales of weights below zero to their magnitudes: what TensorRT asks for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


class PositiveScales(ir.passes.InPlacePass):
    """Dequantize by magnitudes, and multiply by the signs behind that.

    1. A DequantizeLinear in blocks with a constant scale below zero: signs are int8, one a block where one block is all
       that there is along the axis, else one a weight.
    2. One whose scales are all positive, or computed, stays. So does one of 0, which only weights of 0 have: it becomes 1.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in model.graph.all_nodes() if _in_blocks(node) and _scales(node).min() <= 0]
        for node in found:
            _make_positive_(model.graph, node)
        return ir.passes.PassResult(model, bool(found))


def _in_blocks(node: ir.Node) -> bool:
    size = node.attributes.get("block_size")
    constant = all(value is not None and value.is_initializer() for value in node.inputs)
    return node.op_type == "DequantizeLinear" and size is not None and size.as_int() > 0 and constant


def _scales(node: ir.Node) -> np.ndarray:
    return node.inputs[1].const_value.numpy()


def _make_positive_(graph: ir.Graph, node: ir.Node) -> None:
    scales, codes = _scales(node), node.inputs[0]
    axis, block = node.attributes["axis"].as_int(), node.attributes["block_size"].as_int()
    signs = np.sign(scales).astype(np.int8)
    if scales.shape[axis] > 1:
        signs = signs.repeat(block, axis).take(range(codes.shape[axis]), axis)
    name, before = str(node.outputs[0].name), node.inputs[1]
    magnitudes = _initializer(
        graph, f"{name}.magnitudes", np.where(scales == 0, 1, np.abs(scales)).astype(scales.dtype)
    )
    node.replace_input_with(1, magnitudes)
    readers = list(node.outputs[0].uses())
    # No Cast: TensorRT takes int8 constants behind dequantizers alone.
    one = _initializer(graph, f"{name}.one", np.ones((), np.float32))
    floats = ir.node("DequantizeLinear", [_initializer(graph, f"{name}.signs", signs), one])
    signed = ir.node("Mul", [node.outputs[0], floats.outputs[0]])
    graph.insert_after(node, [floats, signed])
    for reader, place in readers:
        reader.replace_input_with(place, signed.outputs[0])
    if not before.uses():
        del graph.initializers[before.name]


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
