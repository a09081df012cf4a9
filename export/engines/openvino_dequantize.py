"""How OpenVINO is to read DequantizeLinear: its own reading refuses blocks of which the last is shorter than the others."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..extras import import_extra
from .openvino_library import operators


def dequantize_extension() -> Any:
    """What a Core is given, before it reads a graph."""
    return import_extra("openvino.frontend.onnx", "openvino").ConversionExtension("DequantizeLinear", _dequantize)


def _dequantize(node: Any) -> list[Any]:
    """y = x s without a zero point, as we write it.

    1. With one scale, or one for each place along `axis`: scales are brought to the shape of x.
    2. With scales for blocks that divide the axis: the axis is split, so that weights stay integers in memory.
    3. With a last block that is shorter: the weights become floats.
    """
    assert node.get_input_size() == 2, "a DequantizeLinear with a zero point"
    (x, scale), ops = (node.get_input(place) for place in (0, 1)), operators()
    axis, block = int(node.get_attribute("axis", 1)), int(node.get_attribute("block_size", 0))
    if not block:
        rank = x.get_partial_shape().rank.get_length()
        ends = [1] * (rank - axis - 1) if scale.get_partial_shape().rank.get_length() else []
        scales = ops.reshape(scale, np.array([-1, *ends]), False) if ends else scale
        return [ops.multiply(ops.convert(x, "f32"), scales).output(0)]
    shape = list(x.get_shape())
    if shape[axis] % block:
        codes, scales = (own.get_node().get_data(dtype=np.float32) for own in (x, scale))
        return [ops.constant(codes * scales.repeat(block, axis).take(range(shape[axis]), axis)).output(0)]
    split = ops.reshape(x, np.array([*shape[:axis], -1, block, *shape[axis + 1 :]]), False)
    scaled = ops.multiply(ops.convert(split, "f32"), ops.unsqueeze(scale, np.array(axis + 1)))
    return [ops.reshape(scaled, np.array(shape), False).output(0)]
