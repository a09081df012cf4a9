"""Where the products of codes lie in an OpenVINO model that was read from one of our graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .engine import ZERO, Array
from .openvino_library import operators

Pair = tuple[int, int]
CHANNELS_LAST, CHANNELS_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
"""Orders of axes by which a graph turns images."""


class Geometry(NamedTuple):
    """Of a convolution."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair


class Codes(NamedTuple):
    """The first factor of a product."""

    scaled: Any
    """What is rounded to codes, in floats."""
    zero: Any
    """The code of 0, a float that is computed; None where it is 0."""
    geometry: Geometry | None
    """How they are cut into windows; None of a linear layer."""


@dataclass(frozen=True)
class Layer:
    """A product of codes and constant weights."""

    codes: Codes
    weights: Array
    """int8 [N, K], or [O, C, kh, kw] of a convolution."""
    floats: Any
    """The node that makes floats of the sums."""

    def replace_(self, sums: Any) -> None:
        """Have `sums` in floats, channels first where this is a convolution, take the place of its own."""
        if self.codes.geometry is None:
            self.floats.output(0).replace(sums.output(0))
            return
        ops, chain = operators(), _up_to_channels_first(self.floats)
        if not chain:
            self.floats.output(0).replace(ops.transpose(sums, np.array(CHANNELS_LAST)).output(0))
            return
        # The scale and the bias.
        for node, before in zip(chain[1:-1], chain, strict=False):
            other = ops.reshape(_other_input(node, before), np.array([1, -1, 1, 1]), False)
            sums = ops.multiply(sums, other) if node.get_type_name() == "Multiply" else ops.add(sums, other)
        chain[-1].output(0).replace(sums.output(0))


def layers_of(model: Any) -> Iterator[Layer]:
    """All products of codes and constant weights."""
    for node in model.get_ordered_ops():
        weights = _weights(node) if _multiplies_integers(node) else None
        if weights is not None:
            codes = _codes(_input(node, 0))
            yield Layer(codes, _shaped(weights, codes.geometry), _only_reader(node))


def computed_products_(model: Any) -> None:
    """Have products of two computed factors in floats, which is what a device would convert them to."""
    ops = operators()
    for node in model.get_ordered_ops():
        if _multiplies_integers(node):
            factors = [
                ops.subtract(*(ops.convert(_input(side, place), "f32") for place in (0, 1))) for side in _inputs(node)
            ]
            product = ops.matmul(*factors, False, False)
            for reader in list(node.output(0).get_target_inputs()):
                reader.replace_source_output(product.output(0))


def _multiplies_integers(node: Any) -> bool:
    return node.get_type_name() == "MatMul" and str(node.get_input_element_type(0).get_type_name()) == "i32"


def _weights(product: Any) -> Array | None:
    """int8 [K, N], unless they are computed. Their zero is constant too."""
    codes, zero = (_constant(side) for side in _inputs(_input(product, 1)))
    return None if codes is None or zero is None else (codes - zero).astype(np.int8)


def _shaped(weights: Array, geometry: Geometry | None) -> Array:
    if geometry is None:
        return np.ascontiguousarray(weights.T)
    split = weights.reshape(*geometry.kernel, -1, weights.shape[1])
    return np.ascontiguousarray(split.transpose(3, 2, 0, 1))


def _codes(difference: Any) -> Codes:
    """`difference`: codes less that of 0, both widened."""
    values, zero = (_input(side, 0) for side in _inputs(difference))
    source, geometry = _windows(values)
    # What is rounded and cut is widened to bytes first.
    quantizer = _input(source, 0)
    constant = _constant(zero)
    assert quantizer.get_type_name() == "FakeQuantize", quantizer
    if constant is not None:
        assert constant == ZERO, constant
        return Codes(_input(quantizer, 0), None, geometry)
    ops = operators()
    return Codes(_input(quantizer, 0), ops.subtract(ops.convert(zero, "f32"), np.float32(ZERO)), geometry)


def _windows(values: Any) -> tuple[Any, Geometry | None]:
    """What windows are cut from, channels first, and how; `values` themselves where they are none."""
    cuts = (
        _inputs(values) if values.get_type_name() == "Concat" else [values] if values.get_type_name() == "Slice" else []
    )
    base = _input(cuts[0], 0) if cuts else values
    padding = (0, 0)
    if base.get_type_name() == "Pad":
        _, high, wide, _ = _numbers(base, 1)
        base, padding = _input(base, 0), (high, wide)
    if base.get_type_name() != "Transpose" or _numbers(base, 1) != CHANNELS_LAST:
        return values, None
    starts = [_numbers(cut, 1) for cut in cuts] or [[0, 0]]
    kernel, dilation = zip(*(_spread([start[axis] for start in starts]) for axis in (0, 1)), strict=True)
    stride = _numbers(cuts[0], 3) if cuts else [1, 1]
    return _input(base, 0), Geometry(kernel, (stride[0], stride[1]), padding, dilation)


def _spread(starts: list[int]) -> Pair:
    """How many different places there are, and how far apart."""
    places = sorted(set(starts))
    return len(places), places[1] - places[0] if len(places) > 1 else 1


def _up_to_channels_first(floats: Any) -> list[Any]:
    """From the floats over a scale and a bias of vectors to the node that puts channels first; empty where it is not so."""
    chain = [floats]
    while (node := _only_reader(chain[-1])) is not None:
        if node.get_type_name() == "Transpose" and _numbers(node, 1) == CHANNELS_FIRST:
            return [*chain, node]
        rank = _other_input(node, chain[-1]).get_output_partial_shape(0).rank if len(node.inputs()) == 2 else None
        if node.get_type_name() not in ("Multiply", "Add") or rank is None or rank.is_dynamic or rank.get_length() > 1:
            break
        chain.append(node)
    return []


def _only_reader(node: Any) -> Any:
    readers = [given.get_node() for given in node.output(0).get_target_inputs()]
    return readers[0] if len(readers) == 1 else None


def _other_input(node: Any, known: Any) -> Any:
    first, second = _inputs(node)
    return second if first.get_name() == known.get_name() else first


def _inputs(node: Any) -> list[Any]:
    return [_input(node, place) for place in range(node.get_input_size())]


def _input(node: Any, place: int) -> Any:
    return node.input_value(place).get_node()


def _numbers(node: Any, place: int) -> list[int]:
    """A constant input that is a list of whole numbers."""
    return [int(number) for number in _input(node, place).data]


def _constant(node: Any) -> Array | None:
    """The value of a constant, widened or not, as int64."""
    while node.get_type_name() == "Convert":
        node = _input(node, 0)
    return node.get_data(dtype=np.int64) if node.get_type_name() == "Constant" else None
