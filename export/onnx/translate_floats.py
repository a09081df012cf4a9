"""Operations on weights in few bits that are computed in floats, as ONNX operators: one function each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset21 as op

Value = Any
"""A value of the graph that is being written."""


def weight_only_linear(
    x: Value, weight: Value, weight_scale: Value, bias: Value | None, weight_bits: int, group_size: int
) -> Value:
    """y = MatMul(x, DequantizeLinear(W)) + b; where groups are a power of two from 16 on, onnxruntime fuses the two.

    The weights stay integers in the file and in memory.
    """
    codes, scale = op.Transpose(weight, perm=[1, 0]), op.Transpose(weight_scale, perm=[1, 0])
    output = op.MatMul(x, op.DequantizeLinear(codes, scale, axis=0, block_size=group_size))
    return output if bias is None else op.Add(output, bias)


def weight_only_conv2d(
    x: Value,
    weight: Value,
    weight_scale: Value,
    bias: Value | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    weight_bits: int,
    group_size: int,
) -> Value:
    """y = Conv(x, DequantizeLinear(W)) + b."""
    weights = op.DequantizeLinear(weight, weight_scale, axis=1, block_size=group_size)
    return _convolution(x, weights, bias, kernel_size, stride, padding, dilation)


def fp8_linear(x: Value, weight: Value, weight_scale: Value, activation_scale: Value, bias: Value | None) -> Value:
    """y = s_x MatMul(DQ(Q(x / s_x)), DQ(W, s_w)) + b; onnxruntime rounds to float8 on the CPU and multiplies in float32."""
    weights = op.DequantizeLinear(op.Transpose(weight, perm=[1, 0]), weight_scale, axis=1)
    output = op.Mul(op.MatMul(_rounded_to_fp8(x, activation_scale), weights), activation_scale)
    return output if bias is None else op.Add(output, bias)


def fp8_conv2d(
    x: Value,
    weight: Value,
    weight_scale: Value,
    activation_scale: Value,
    bias: Value | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Value:
    """y = s_x Conv(DQ(Q(x / s_x)), DQ(W, s_w)) + b, as `fp8_linear`."""
    weights = op.DequantizeLinear(weight, weight_scale, axis=0)
    rounded = _rounded_to_fp8(x, activation_scale)
    output = op.Mul(_convolution(rounded, weights, None, kernel_size, stride, padding, dilation), activation_scale)
    return output if bias is None else op.Add(output, op.Reshape(bias, op.Constant(value_ints=[-1, 1, 1])))


def _rounded_to_fp8(x: Value, scale: Value) -> Value:
    """x / scale, clipped and rounded; as for integers the quantiser is constant and the step's scale is outside of it."""
    one, zero = op.Constant(value_float=1.0), np.zeros((), ir.DataType.FLOAT8E4M3FN.numpy())
    return op.DequantizeLinear(op.QuantizeLinear(op.Div(x, scale), one, op.Constant(value=ir.tensor(zero))), one)


def _convolution(
    x: Value,
    weights: Value,
    bias: Value | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Value:
    """`x` [B, C, H, W] convolved with float weights [O, C*kh*kw]."""
    # 0 leaves a size as it is.
    kernel = op.Reshape(weights, op.Constant(value_ints=[0, -1, *kernel_size]))
    return op.Conv(x, kernel, bias, strides=stride, pads=[*padding, *padding], dilations=dilation)
