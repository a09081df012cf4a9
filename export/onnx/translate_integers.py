"""Operations on integer weights and integer activations as ONNX operators: one function each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset21 as op

from diffpress.kernels import code_range

from ..engines.engine import ZERO

Value = Any
"""A value of the graph that is being written."""
END = 2**62
"""Past the end of every axis."""


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
    """y = s_x s_w MatMulInteger(Q(x), W, z) + b, which onnxruntime fuses into one kernel. Weights are int8 here.

    Speed over floats of whole denoisers, batch 2 and 8, one thread of a Zen 5 core: 8-layer DiT of width 128 1.44 and
    1.49, emoji UNet 1.24 and 1.37. The same with Q/DQ pairs in uint8: 1.2 everywhere (three passes over the output
    instead of none); in int8: 0.9 to 1.05, since onnxruntime runs layers that share a quantiser in floats.
    """
    zero = _zero(zero_point)
    codes = _quantized(x, activation_scale, zero_point, activation_bits)
    return _product(codes, zero, op.Transpose(weight, perm=[1, 0]), weight_scale, activation_scale, bias)


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
    """y = s_x s_w MatMulInteger(windows of Q(x), W, z) + b, channels last; the windows are cut from 8-bit codes.

    onnxruntime has no integer convolution with a float output. Speed over a float Conv, one thread of a Zen 5 core,
    [batch, channels, side] with 3x3 kernels: [2, 96, 8] 2.0, [8, 96, 8] 1.8, [2, 320, 64] 1.5, [4, 320, 32] 2.1,
    [4, 640, 16] 3.3, [2, 32, 32] 0.9; 1x1: 1.1 to 2.4. A Q/DQ Conv falls back to float (0.6 to 0.9), ConvInteger is
    0.2, QLinearConv is 1.6 to 3.8 but rounds its output to 8 bits.
    """
    zero = _zero(zero_point)
    codes = op.Transpose(_quantized(x, activation_scale, zero_point, activation_bits), perm=[0, 2, 3, 1])
    windows = _windows(codes, zero, kernel_size, stride, padding, dilation)
    output = _product(windows, zero, _window_weights(weight, kernel_size), weight_scale, activation_scale, bias)
    return op.Transpose(output, perm=[0, 3, 1, 2])


def _zero(zero_point: Value | None) -> Value:
    """The uint8 code of 0."""
    if zero_point is None:
        return scalar(ZERO, np.uint8)
    return op.Cast(op.Add(op.Squeeze(zero_point), scalar(ZERO, np.int32)), to=int(ir.DataType.UINT8))


def _quantized(x: Value, scale: Value, zero_point: Value | None, bits: int) -> Value:
    """uint8 codes of x / scale, cut to what `bits` hold where the quantiser itself would not.

    The quantiser is constant, with scale 1 and the zero point of symmetric codes, and the step's scale and zero point are
    outside of it: the form that engines understand.
    """
    return op.QuantizeLinear(scaled(x, scale, zero_point, bits), op.Constant(value_float=1.0), scalar(ZERO, np.uint8))


def scaled(x: Value, scale: Value, zero_point: Value | None, bits: int) -> Value:
    """x / scale, moved and cut in floats, so that a constant quantiser with scale 1 makes the codes of it."""
    moved = op.Div(x, scale)
    if zero_point is not None:
        # Halves go to even codes before they are moved: the quantiser may not round the sum.
        moved = op.Add(op.Round(moved), op.Cast(zero_point, to=int(ir.DataType.FLOAT)))
    if bits >= 8:
        return moved
    low, high = code_range(bits)
    return op.Clip(moved, scalar(low, np.float32), scalar(high, np.float32))


def _product(codes: Value, zero: Value, weight: Value, weight_scale: Value, scale: Value, bias: Value | None) -> Value:
    """Codes [..., K], less `zero`, times weights [K, N], summed as integers, in floats and with the bias on top."""
    product = op.Cast(op.MatMulInteger(codes, weight, zero), to=int(ir.DataType.FLOAT))
    output = op.Mul(product, op.Mul(scale, weight_scale))
    return output if bias is None else op.Add(output, bias)


def _windows(
    codes: Value,
    zero: Value,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Value:
    """Codes [B, H, W, C] to [B, H', W', kh*kw*C], padded with `zero`."""
    if any(padding):
        amounts = [0, padding[0], padding[1], 0] * 2
        codes = op.Pad(codes, op.Constant(value_ints=amounts), zero)
    places = [(row, column) for row in range(kernel_size[0]) for column in range(kernel_size[1])]
    if places == [(0, 0)] and tuple(stride) == (1, 1):
        return codes
    return op.Concat(*[_shifted(codes, place, kernel_size, stride, dilation) for place in places], axis=3)


def _shifted(
    codes: Value, place: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Value:
    """What the kernel's weight at `place` is multiplied with, at every output position."""
    starts = [place[axis] * dilation[axis] for axis in (0, 1)]
    left = [(kernel_size[axis] - 1 - place[axis]) * dilation[axis] for axis in (0, 1)]
    ends = [-rest if rest else END for rest in left]
    bounds = [op.Constant(value_ints=values) for values in (starts, ends, [1, 2], list(stride))]
    return op.Slice(codes, *bounds)


def _window_weights(weight: Value, kernel_size: Sequence[int]) -> Value:
    """Weights [O, C*kh*kw] to [kh*kw*C, O], in the order of `_windows`."""
    rows, places = weight.shape[0], kernel_size[0] * kernel_size[1]
    split = op.Reshape(weight, op.Constant(value_ints=[rows, -1, places]))
    return op.Reshape(op.Transpose(split, perm=[2, 1, 0]), op.Constant(value_ints=[-1, rows]))


def scalar(value: int, dtype: type[np.generic]) -> Value:
    """A constant of the graph."""
    return op.Constant(value=ir.tensor(np.asarray(value, dtype)))
