"""Products of codes in OpenVINO, in a form that is exact on the device and fast there.

As graphs are read, codes are widened to int32 and multiplied in float32, and convolutions are windows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .engine import Array
from .openvino_graph import Geometry, Layer, Pair, computed_products_, layers_of
from .openvino_library import library, operators

LOW, HIGH, LEVELS = -128, 127, 256
"""Codes of 8 bits."""
WIDE, NARROW = 8, 7
"""Bits of weights. Of 7 bits and fewer, two products with codes fit the 16 bits in which x86 without VNNI adds them."""
DEPTH, WIDTH, SIDE = 66, 16, 4
"""Of the layers that are tried: 66 is no multiple of what a processor adds at once."""
TRIED = Geometry((3, 3), (1, 1), (1, 1), (1, 1))

Run = Callable[[Any, Array], Array]
"""Compiles a model and gives its answer to an input."""


class ExactProducts(NamedTuple):
    """Bits of the widest weights whose products with codes a device computes in integers and exactly; 0 where none are."""

    linear: int
    conv2d: int

    def words(self) -> str:
        """For people."""
        linear, conv2d = (f"weights of up to {bits} bits" if bits else "no weights" for bits in self)
        return (
            f"linear layers in integers with {linear}, convolutions with {conv2d}, others on the same codes in float32"
        )


def exact_products(run: Run) -> ExactProducts:
    """Found by trying the largest codes and weights.

    Linear layers are in integers with wide weights or not at all: where bytes are added in 16 bits, they take 1.2 of the
    time of floats (one thread of a Zen 3 core, [256, 320] x 320), and convolutions 0.55 (3x3, 320 to 320 channels of 16x16).
    """
    linear = WIDE if _is_exact(run, WIDE, None) else 0
    return ExactProducts(linear, next((bits for bits in (WIDE, NARROW) if _is_exact(run, bits, TRIED)), 0))


def rewrite_products_(model: Any, exact: ExactProducts) -> None:
    """Write every product of codes anew.

    1. With weights that fit: codes of a quantiser of scale 1, times int8 weights.
    2. With others: the same codes, rounded and cut in floats, times the weights as floats.
    3. Windows become a convolution, channels first.
    4. Where the code of 0 is z, z times the sum of the weights is subtracted, and edges are padded with z.
    5. Two computed factors, as in attention: in floats.
    """
    for layer in list(layers_of(model)):
        bits = exact.linear if layer.codes.geometry is None else exact.conv2d
        layer.replace_(_sums(layer, bool(bits) and _fits(layer.weights, bits)))
    computed_products_(model)
    model.validate_nodes_and_infer_types()


def _fits(weights: Array, bits: int) -> bool:
    return bool(-(2 ** (bits - 1)) <= weights.min() and weights.max() < 2 ** (bits - 1))


def _sums(layer: Layer, integers: bool) -> Any:
    """What the layer sums up, in floats."""
    ops, (x, zero, geometry) = operators(), layer.codes
    if zero is None:
        return _multiply(x, layer.weights, geometry, integers)
    if geometry is not None and any(geometry.padding):
        x, geometry = _padded(x, zero, geometry.padding), geometry._replace(padding=(0, 0))
    totals = layer.weights.astype(np.int64).sum(tuple(range(1, layer.weights.ndim)))
    shape = (-1,) if geometry is None else (-1, 1, 1)
    moved = ops.multiply(zero, totals.astype(np.float32).reshape(shape))
    return ops.subtract(_multiply(x, layer.weights, geometry, integers), moved)


def _padded(x: Any, zero: Any, padding: Pair) -> Any:
    """OpenVINO pads with the number it was given first, whatever it is given later: so with a constant, and then moved."""
    ops, amounts = operators(), np.array([0, 0, *padding])
    return ops.add(ops.pad(ops.subtract(x, zero), amounts, amounts, "constant", np.float32(0)), zero)


def _multiply(x: Any, weights: Array, geometry: Geometry | None, integers: bool) -> Any:
    """Codes of `x`, which is scaled, times int8 weights [N, K], or [O, C, kh, kw] where there is a geometry."""
    ops = operators()
    if integers:
        low, high = np.float32(LOW), np.float32(HIGH)
        codes = ops.fake_quantize(x, low, high, low, high, LEVELS)
        # By a scale, though it is 1, OpenVINO knows weights in integers.
        ones = np.ones((len(weights), *[1] * (weights.ndim - 1)), np.float32)
        factors = ops.multiply(ops.convert(ops.constant(weights), "f32"), ones)
    else:
        codes = ops.round(ops.clamp(x, float(LOW), float(HIGH)), "half_to_even")
        factors = ops.constant(weights.astype(np.float32))
    if geometry is None:
        return ops.matmul(codes, factors, False, True)
    _, stride, padding, dilation = map(list, geometry)
    return ops.convolution(codes, factors, stride, padding, padding, dilation)


def _is_exact(run: Run, bits: int, geometry: Geometry | None) -> bool:
    """Whether sums in integers are those in floats, which are exact: there are few enough products in one."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    kernel = () if geometry is None else geometry.kernel
    weights = np.resize(np.array([high, low, high, high, low], np.int8), (WIDTH, DEPTH, *kernel))
    weights[0], weights[1] = high, low
    codes = np.resize(np.array([HIGH, HIGH, LOW, HIGH, 0, LOW], np.float32), (2, DEPTH, SIDE, SIDE))
    codes[0], codes[1, :, 0] = HIGH, LOW
    given = codes if kernel else codes.reshape(1, -1, DEPTH)
    integers, floats = (run(_model(given, weights, geometry, form), given) for form in (True, False))
    return bool(np.array_equal(integers, floats))


def _model(given: Array, weights: Array, geometry: Geometry | None, integers: bool) -> Any:
    x = operators().parameter([-1, *given.shape[1:]], np.float32, "x")
    x.output(0).set_names({"x"})
    return library().Model([_multiply(x, weights, geometry, integers)], [x])
