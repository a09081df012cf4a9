"""Weights whose last block is shorter than the others to floats: TensorRT asks for whole ones."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


class WholeBlocks(ir.passes.InPlacePass):
    """Compute a DequantizeLinear of constants whose axis its blocks do not divide; others stay."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in model.graph.all_nodes() if _has_a_short_block(node)]
        for node in found:
            codes, scales = (value.const_value.numpy().astype(np.float32) for value in node.inputs)
            axis, block = (node.attributes[name].as_int() for name in ("axis", "block_size"))
            floats = codes * scales.repeat(block, axis).take(range(codes.shape[axis]), axis)
            tensor = ir.tensor(floats, name=f"{node.outputs[0].name}.floats")
            value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            model.graph.register_initializer(value)
            node.outputs[0].replace_all_uses_with(value)
            given = list(node.inputs)
            model.graph.remove(node, safe=True)
            for unused in (own for own in given if not own.uses()):
                del model.graph.initializers[unused.name]
        return ir.passes.PassResult(model, bool(found))


def _has_a_short_block(node: ir.Node) -> bool:
    size = node.attributes.get("block_size")
    constant = all(value is not None and value.is_initializer() for value in node.inputs)
    if node.op_type != "DequantizeLinear" or size is None or not size.as_int() or not constant:
        return False
    return node.inputs[0].shape[node.attributes["axis"].as_int()] % size.as_int() > 0
