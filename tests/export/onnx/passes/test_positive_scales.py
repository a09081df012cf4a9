"""Scales of weights below zero."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from diffpress.export.onnx.passes import PositiveScales

TEXT = """
<ir_version: 10, opset_import: ["": 21]>
weights (float[N, 4] x) => (float[N, 2] whole, float[N, 2] blocks, float[N, 2] positive)
<int8[4, 2] w = {-128, 127, 0, -1, 1, 5, -7, 9}, float[1, 2] one = {-2.0, 3.0}, float[2, 2] two = {1.0, -2.0, 0.0, 4.0},
 float[1, 2] fine = {2.0, 3.0}>
{
    a = DequantizeLinear<axis = 0, block_size = 4>(w, one)
    b = DequantizeLinear<axis = 0, block_size = 2>(w, two)
    c = DequantizeLinear<axis = 0, block_size = 4>(w, fine)
    whole = MatMul(x, a)
    blocks = MatMul(x, b)
    positive = MatMul(x, c)
}
"""


@pytest.fixture
def model() -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(TEXT))


def test_weights_are_as_before_with_no_scale_below_zero(model: ir.Model) -> None:
    x = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}
    before = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, x)
    assert PositiveScales()(model).modified
    after = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, x)
    for found, expected in zip(after, before, strict=True):
        np.testing.assert_array_equal(found, expected)
    scales = [node.inputs[1].const_value.numpy() for node in model.graph if node.op_type == "DequantizeLinear"]
    assert all((own > 0).all() for own in scales)
    assert not {"one", "two"} & model.graph.initializers.keys()
    assert sum(node.op_type == "Mul" for node in model.graph) == 2


def test_a_second_time_changes_nothing(model: ir.Model) -> None:
    PositiveScales()(model)
    assert not PositiveScales()(model).modified
