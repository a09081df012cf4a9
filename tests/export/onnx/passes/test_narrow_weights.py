"""int8 weights that fit four bits."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from diffpress.export.onnx.passes import NarrowWeights

TEXT = """
<ir_version: 10, opset_import: ["": 21]>
weights (uint8[N, 2] x) => (float[2, 2] first, float[2, 2] second, int32[N, 2] third, float[2, 2] fourth)
<int8[2, 2] fits = {-8, 7, 0, 1}, int8[2, 2] large = {-8, 8, 0, 1}, int8[2, 2] multiplied = {1, 2, 3, 4},
 int8[2, 2] whole = {1, 2, 3, 4}, float[1, 2] scales = {2.0, 3.0}, float scale = {2.0}>
{
    first = DequantizeLinear<axis = 0, block_size = 2>(fits, scales)
    second = DequantizeLinear<axis = 0, block_size = 2>(large, scales)
    third = MatMulInteger(x, multiplied)
    fourth = DequantizeLinear(whole, scale)
}
"""


def test_only_what_fits_and_is_only_dequantized_in_blocks_is_narrowed() -> None:
    model = ir.from_proto(onnx.parser.parse_model(TEXT))
    assert NarrowWeights()(model).modified
    stored = model.graph.initializers
    assert {name: stored[name].dtype for name in ("fits", "large", "multiplied", "whole")} == {
        "fits": ir.DataType.INT4,
        "large": ir.DataType.INT8,
        "multiplied": ir.DataType.INT8,
        "whole": ir.DataType.INT8,
    }
    np.testing.assert_array_equal(stored["fits"].const_value.numpy().astype(int), [[-8, 7], [0, 1]])
    assert not NarrowWeights()(model).modified
