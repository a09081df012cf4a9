"""int8 weights of integer products to unsigned ones: the form that is exact on every processor."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from diffpress.kernels import code_range

from ...engines.engine import ZERO

NARROW_ZERO = 8
"""Code of 0 in four unsigned bits."""


class CenterWeights(ir.passes.InPlacePass):
    """Move the int8 weights of products to unsigned codes, and tell the product which is their zero.

    1. Weights that fit four bits stand as uint4 in the file, with 8 as their zero, and a Cast to uint8 behind them: engines
       do that once, when they load the graph (onnxruntime from 1.23 on).
    2. Others become uint8, with 128 as their zero.
    3. Products that share weights go on sharing them.
    4. A MatMulInteger of two computed factors stays: attention is translated in uint8 already.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        products = [node for node in model.graph.all_nodes() if _takes_int8_weights(node)]
        moved: dict[str, tuple[ir.Value, ir.Value]] = {}
        for node in products:
            weights = node.inputs[1]
            assert weights is not None
            if weights.name not in moved:
                moved[weights.name] = _narrow(model, weights) if _fits(weights) else _wide(model, weights)
            codes, zero = moved[weights.name]
            node.replace_input_with(1, codes)
            node.resize_inputs(4)
            node.replace_input_with(3, zero)
            if not weights.uses():
                del model.graph.initializers[weights.name]
        return ir.passes.PassResult(model, bool(products))


def _takes_int8_weights(node: ir.Node) -> bool:
    if node.op_type != "MatMulInteger":
        return False
    weights, zero = node.inputs[1], node.inputs[3] if len(node.inputs) > 3 else None
    return weights.is_initializer() and weights.dtype == ir.DataType.INT8 and zero is None


def _fits(weights: ir.Value) -> bool:
    codes, (low, high) = weights.const_value.numpy(), code_range(4)
    return bool(low <= codes.min() and codes.max() <= high)


def _narrow(model: ir.Model, weights: ir.Value) -> tuple[ir.Value, ir.Value]:
    codes = (weights.const_value.numpy() + np.int8(NARROW_ZERO)).astype(ir.DataType.UINT4.numpy())
    cast = ir.node("Cast", [_initializer(model, f"{weights.name}_uint4", codes)], {"to": ir.DataType.UINT8})
    model.graph.insert_before(model.graph[0], cast)
    return cast.outputs[0], _zero(model, "zero_of_narrow_weights", NARROW_ZERO)


def _wide(model: ir.Model, weights: ir.Value) -> tuple[ir.Value, ir.Value]:
    # Adding 128 flips the highest bit, and nothing else.
    codes = weights.const_value.numpy().view(np.uint8) ^ np.uint8(ZERO)
    return _initializer(model, f"{weights.name}_uint8", codes), _zero(model, "zero_of_weights", ZERO)


def _zero(model: ir.Model, name: str, value: int) -> ir.Value:
    known = model.graph.initializers.get(name)
    return known or _initializer(model, name, np.array(value, np.uint8))


def _initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value
