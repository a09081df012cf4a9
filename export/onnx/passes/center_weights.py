"""int8 weights of integer products to uint8: the form that is exact on every processor."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...engines.engine import ZERO


class CenterWeights(ir.passes.InPlacePass):
    """Move the int8 weights of products by 128 into uint8, and tell the product that 128 is their zero.

    1. A MatMulInteger whose second factor is an int8 initializer without a zero point takes the moved one.
    2. Products that share weights go on sharing them.
    3. A MatMulInteger of two computed factors stays: attention is translated in uint8 already.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        products = [node for node in model.graph.all_nodes() if _takes_int8_weights(node)]
        if not products:
            return ir.passes.PassResult(model, False)
        zero = _initializer(model, "zero_of_weights", np.array(ZERO, np.uint8))
        moved: dict[str, ir.Value] = {}
        for node in products:
            weights = node.inputs[1]
            assert weights is not None
            if weights.name not in moved:
                moved[weights.name] = _initializer(model, f"{weights.name}_uint8", _moved(weights))
            node.replace_input_with(1, moved[weights.name])
            node.resize_inputs(4)
            node.replace_input_with(3, zero)
            if not weights.uses():
                del model.graph.initializers[weights.name]
        return ir.passes.PassResult(model, True)


def _takes_int8_weights(node: ir.Node) -> bool:
    if node.op_type != "MatMulInteger":
        return False
    weights, zero = node.inputs[1], node.inputs[3] if len(node.inputs) > 3 else None
    return weights.is_initializer() and weights.dtype == ir.DataType.INT8 and zero is None


def _moved(weights: ir.Value) -> np.ndarray:
    # Adding 128 flips the highest bit, and nothing else.
    return weights.const_value.numpy().view(np.uint8) ^ np.uint8(ZERO)


def _initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value
