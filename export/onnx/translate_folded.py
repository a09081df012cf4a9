"""Operations on integers as pairs of quantizers and dequantizers, which TensorRT runs in integers: one function each.

The quantiser is constant, with scale 1 and no zero point, and a step's scale and zero point are outside of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnxscript import opset21 as op

from .translate_attention import LARGEST
from .translate_integers import Value, scalar, scaled

FLOAT = int(ir.DataType.FLOAT)


def quantized_linear(
    x: Value,
    weight: Value,
    weight_scale: Value,
    activation_scale: Value,
    zero_point: Value | None,
    bias: Value | None,
    weight_bits: int,
    activation_bits: int,
) -> Value:
    """y = s_x s_w (MatMul(DQ(Q(x / s_x + z)), DQ(W)) - z sum(W)) + b, so that sums of codes are exact in floats too.

    Weights are int8 here.
    """
    weights = op.DequantizeLinear(op.Transpose(weight, perm=[1, 0]), op.Constant(value_float=1.0))
    product = op.MatMul(_codes(x, activation_scale, zero_point, activation_bits), weights)
    if zero_point is not None:
        product = op.Sub(product, _moved(weight, zero_point))
    output = op.Mul(product, op.Mul(activation_scale, weight_scale))
    return output if bias is None else op.Add(output, bias)


def quantized_conv2d(
    x: Value,
    weight: Value,
    weight_scale: Value,
    activation_scale: Value,
    zero_point: Value | None,
    bias: Value | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    weight_bits: int,
    activation_bits: int,
) -> Value:
    """The same with Conv; where there is a zero point, edges are padded before it is added."""
    edges = [*padding, *padding]
    if zero_point is not None and any(padding):
        amounts = op.Constant(value_ints=[0, 0, *padding] * 2)
        x, edges = op.Pad(x, amounts), [0, 0, 0, 0]
    kernel = op.Reshape(weight, op.Constant(value_ints=[0, -1, *kernel_size]))
    weights = op.DequantizeLinear(kernel, op.Constant(value_float=1.0))
    codes = _codes(x, activation_scale, zero_point, activation_bits)
    product = op.Conv(codes, weights, strides=stride, pads=edges, dilations=dilation)
    if zero_point is not None:
        product = op.Sub(product, _over_channels(_moved(weight, zero_point)))
    output = op.Mul(product, _over_channels(op.Mul(activation_scale, weight_scale)))
    return output if bias is None else op.Add(output, _over_channels(bias))


def int8_attention(query: Value, key: Value, value: Value, integer_values: bool = False) -> Value:
    """Attention on the same codes, multiplied in floats: TensorRT has no quantiser whose scale is computed a token."""
    smooth = op.Sub(key, op.ReduceMean(key, _axes(2), keepdims=1))
    (q_codes, q_scale), (k_codes, k_scale) = _token_codes(query, 3), _token_codes(smooth, 3)
    scale = op.Mul(q_scale, op.Constant(value_float=query.shape[3] ** -0.5))
    products = op.MatMul(q_codes, op.Transpose(k_codes, perm=[0, 1, 3, 2]))
    scores = op.Mul(op.Mul(products, scale), op.Transpose(k_scale, perm=[0, 1, 3, 2]))
    if not integer_values:
        return op.MatMul(op.Softmax(scores, axis=-1), value)
    powers = op.Exp(op.Sub(scores, op.ReduceMax(scores, _axes(3), keepdims=1)))
    weights = op.Round(op.Mul(powers, op.Constant(value_float=float(LARGEST))))
    v_codes, v_scale = _token_codes(value, 2)
    return op.Mul(op.Div(op.MatMul(weights, v_codes), op.ReduceSum(weights, _axes(3), keepdims=1)), v_scale)


def _codes(x: Value, scale: Value, zero_point: Value | None, bits: int) -> Value:
    """int8 codes of x / scale, as floats again."""
    one = op.Constant(value_float=1.0)
    return op.DequantizeLinear(op.QuantizeLinear(scaled(x, scale, zero_point, bits), one, scalar(0, np.int8)), one)


def _moved(weight: Value, zero_point: Value) -> Value:
    """z sum(W) [N]."""
    sums = op.ReduceSum(op.DequantizeLinear(weight, op.Constant(value_float=1.0)), _axes(1), keepdims=0)
    return op.Mul(sums, op.Cast(zero_point, to=FLOAT))


def _token_codes(x: Value, axis: int) -> tuple[Value, Value]:
    """Codes of `x` as floats, and the scales that put the largest magnitude along `axis` at the largest; 1 where all is 0."""
    found = op.Div(op.ReduceMax(op.Abs(x), _axes(axis), keepdims=1), op.Constant(value_float=float(LARGEST)))
    scale = op.Where(op.Greater(found, op.Constant(value_float=0.0)), found, op.Constant(value_float=1.0))
    return op.Round(op.Div(x, scale)), scale


def _over_channels(value: Value) -> Value:
    return op.Reshape(value, op.Constant(value_ints=[-1, 1, 1]))


def _axes(axis: int) -> Value:
    return op.Constant(value_ints=[axis])
