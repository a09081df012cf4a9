"""Weights whose last block is shorter than the others."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from diffpress.export.onnx.passes import WholeBlocks

TEXT = """
<ir_version: 10, opset_import: ["": 21]>
weights (float[N, 3] x) => (float[N, 2] short, float[N, 2] whole)
<int8[3, 2] w = {-128, 127, 0, -1, 1, 5}, float[2, 2] two = {1.0, -2.0, 0.5, 4.0}, float[1, 2] one = {2.0, 3.0}>
{
    a = DequantizeLinear<axis = 0, block_size = 2>(w, two)
    b = DequantizeLinear<axis = 0, block_size = 3>(w, one)
    short = MatMul(x, a)
    whole = MatMul(x, b)
}
"""


def test_only_what_does_not_divide_becomes_floats() -> None:
    model = ir.from_proto(onnx.parser.parse_model(TEXT))
    assert WholeBlocks()(model).modified
    kept, short, whole = model.graph
    assert (kept.op_type, whole.inputs[1]) == ("DequantizeLinear", kept.outputs[0])
    np.testing.assert_array_equal(short.inputs[1].const_value.numpy(), [[-128, -254], [0, 2], [0.5, 20]])
    assert "two" not in model.graph.initializers
    assert not WholeBlocks()(model).modified
