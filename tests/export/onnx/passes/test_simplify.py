"""Traced graphs without what computes nothing."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from diffpress.export.onnx.passes import Simplify

TEXT = """
<ir_version: 10, opset_import: ["": 21]>
layers (float[N, 3] x) => (float[N, 3] y)
{
    one = Constant<value = float {1.0}>()
    two = Add(one, one)
    same = Mul(x, one)
    turned = Transpose<perm = [1, 0]>(same)
    back = Transpose<perm = [1, 0]>(turned)
    left = Mul(back, two)
    another = Constant<value = float {2.0}>()
    right = Mul(x, another)
    y = Sub(left, right)
}
"""


def test_only_what_computes_something_is_left_and_that_once() -> None:
    model = ir.from_proto(onnx.parser.parse_model(TEXT))
    Simplify()(model)
    assert [node.op_type for node in model.graph] == ["Mul", "Sub"]
    (product, difference) = model.graph
    (factor,) = model.graph.initializers.values()
    assert factor.const_value.numpy() == 2
    assert list(product.inputs) == [model.graph.inputs[0], factor]
    assert list(difference.inputs) == [product.outputs[0]] * 2
    assert model.graph.outputs[0].name == "y"
