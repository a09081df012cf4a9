"""Constants laid out once."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from diffpress.export.onnx.passes import LayWeightsOut

TEXT = """
<ir_version: 10, opset_import: ["": 21]>
layers (float[N, 3] x) => (float[N, 2] y, float[3, N] z)
<int8[2, 3] w = {1, 2, 3, 4, 5, 6}, float scale = {0.5}>
{
    transposed = Transpose<perm = [1, 0]>(w)
    weights = DequantizeLinear(transposed, scale)
    y = MatMul(x, weights)
    z = Transpose<perm = [1, 0]>(x)
}
"""


def test_only_layouts_of_constants_are_folded() -> None:
    model = ir.from_proto(onnx.parser.parse_model(TEXT))
    assert LayWeightsOut()(model).modified
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "MatMul", "Transpose"]
    (dequantize, *_) = model.graph
    np.testing.assert_array_equal(dequantize.inputs[0].const_value.numpy(), [[1, 4], [2, 5], [3, 6]])
    assert "w" not in model.graph.initializers
    assert not LayWeightsOut()(model).modified
