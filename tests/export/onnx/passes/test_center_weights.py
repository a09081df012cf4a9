"""int8 weights of products to uint8."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from diffpress.export.onnx.passes import CenterWeights

TEXT = """
<ir_version: 10, opset_import: ["": 21]>
products (uint8[N, 3] x, int8[3, 2] y) => (int32[N, 2] first, int32[N, 2] second, int32[N, 2] computed, int32[N, 2] narrow)
<int8[3, 2] w = {-128, 127, 0, -1, 1, 5}, int8[3, 2] few = {-8, 7, 0, -1, 1, 5}, uint8 zero = {128}>
{
    first = MatMulInteger(x, w, zero)
    second = MatMulInteger(x, w, zero)
    computed = MatMulInteger(x, y, zero)
    narrow = MatMulInteger(x, few, zero)
}
"""


@pytest.fixture
def model() -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(TEXT))


def test_weights_are_moved_once_and_their_zero_told(model: ir.Model) -> None:
    assert CenterWeights()(model).modified
    _, first, second, computed, _ = model.graph
    weights, zero = first.inputs[1], first.inputs[3]
    assert second.inputs[1] is weights
    np.testing.assert_array_equal(weights.const_value.numpy(), [[0, 255], [128, 127], [129, 133]])
    assert zero.const_value.numpy() == 128
    assert "w" not in model.graph.initializers
    assert computed.inputs[1].name == "y"
    assert len(computed.inputs) == 3


def test_weights_of_four_bits_take_four_in_the_file(model: ir.Model) -> None:
    before = ir.to_proto(model)
    CenterWeights()(model)
    cast, *_, product = model.graph
    stored = cast.inputs[0]
    assert stored.dtype == ir.DataType.UINT4
    np.testing.assert_array_equal(stored.const_value.numpy().astype(int), [[0, 15], [8, 7], [9, 13]])
    assert product.inputs[1] is cast.outputs[0]
    x = np.array([[255, 0, 128], [1, 200, 77]], np.uint8)
    inputs = {"x": x, "y": np.ones((3, 2), np.int8)}
    for found, expected in zip(_run(ir.to_proto(model), inputs), _run(before, inputs), strict=True):
        np.testing.assert_array_equal(found, expected)


def _run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)


def test_a_second_time_changes_nothing(model: ir.Model) -> None:
    CenterWeights()(model)
    assert not CenterWeights()(model).modified
