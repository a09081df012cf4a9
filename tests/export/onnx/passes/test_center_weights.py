"""int8 weights of products to uint8."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from diffpress.export.onnx.passes import CenterWeights

TEXT = """
<ir_version: 10, opset_import: ["": 21]>
products (uint8[N, 3] x, int8[3, 2] y) => (int32[N, 2] first, int32[N, 2] second, int32[N, 2] computed)
<int8[3, 2] w = {-128, 127, 0, -1, 1, 5}, uint8 zero = {128}>
{
    first = MatMulInteger(x, w, zero)
    second = MatMulInteger(x, w, zero)
    computed = MatMulInteger(x, y, zero)
}
"""


@pytest.fixture
def model() -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(TEXT))


def test_weights_are_moved_once_and_their_zero_told(model: ir.Model) -> None:
    assert CenterWeights()(model).modified
    first, second, computed = model.graph
    weights, zero = first.inputs[1], first.inputs[3]
    assert second.inputs[1] is weights
    np.testing.assert_array_equal(weights.const_value.numpy(), [[0, 255], [128, 127], [129, 133]])
    assert zero.const_value.numpy() == 128
    assert "w" not in model.graph.initializers
    assert computed.inputs[1].name == "y"
    assert len(computed.inputs) == 3


def test_a_second_time_changes_nothing(model: ir.Model) -> None:
    CenterWeights()(model)
    assert not CenterWeights()(model).modified
