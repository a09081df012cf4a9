"""Attention on integers as ONNX operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset21 as op

from diffpress.kernels import code_range

from ..engines.engine import ZERO

Value = Any
"""A value of the graph that is being written."""
LARGEST = code_range(8)[1]
FLOAT = int(ir.DataType.FLOAT)


def int8_attention(query: Value, key: Value, value: Value, integer_values: bool = False) -> Value:
    """softmax(s_q s_k MatMulInteger(Q(q), Q(k - mean(k))^T) / sqrt(D)) v, scales found a token; heads are [B, H, T, D].

    With `integer_values`, s_v MatMulInteger(P, Q(v)) / sum(P), with P = round(127 exp(scores - largest)). All codes are
    uint8: pairs of products with int8 saturate on x86 without VNNI.
    Faithful rather than fast: speed over floats on one thread of an EPYC, [16, 1024, 40] 0.8, with integer values 0.6;
    [16, 1024, 80] 1.1 and 0.9. Finding scales and codes costs what the products gain.
    """
    zero = _scalar(ZERO)
    smooth = op.Sub(key, op.ReduceMean(key, _axes(2), keepdims=1))
    (q_codes, q_scale), (k_codes, k_scale) = _quantized(query, 3, zero), _quantized(smooth, 3, zero)
    products = op.MatMulInteger(q_codes, op.Transpose(k_codes, perm=[0, 1, 3, 2]), zero, zero)
    scale = op.Mul(q_scale, op.Constant(value_float=query.shape[3] ** -0.5))
    scores = op.Mul(op.Mul(op.Cast(products, to=FLOAT), scale), op.Transpose(k_scale, perm=[0, 1, 3, 2]))
    if not integer_values:
        return op.MatMul(op.Softmax(scores, axis=-1), value)
    powers = op.Exp(op.Sub(scores, op.ReduceMax(scores, _axes(3), keepdims=1)))
    weights = op.Round(op.Mul(powers, op.Constant(value_float=float(LARGEST))))
    v_codes, v_scale = _quantized(value, 2, zero)
    products = op.MatMulInteger(op.Cast(weights, to=int(ir.DataType.UINT8)), v_codes, _scalar(0), zero)
    sums = op.Cast(products, to=FLOAT)
    return op.Mul(op.Div(sums, op.ReduceSum(weights, _axes(3), keepdims=1)), v_scale)


def _quantized(x: Value, axis: int, zero: Value) -> tuple[Value, Value]:
    """uint8 codes of `x` and the scales that put the largest magnitude along `axis` at the largest; 1 where all is 0."""
    found = op.Div(op.ReduceMax(op.Abs(x), _axes(axis), keepdims=1), op.Constant(value_float=float(LARGEST)))
    scale = op.Where(op.Greater(found, op.Constant(value_float=0.0)), found, op.Constant(value_float=1.0))
    return op.QuantizeLinear(op.Div(x, scale), op.Constant(value_float=1.0), zero), scale


def _axes(axis: int) -> Value:
    return op.Constant(value_ints=[axis])


def _scalar(value: int) -> Value:
    return op.Constant(value=ir.tensor(np.asarray(value, np.uint8)))
