"""Weights that fit four bits to four bits in the file."""

from __future__ import annotations

import onnx_ir as ir

from diffpress.kernels import code_range

BITS = 4


class NarrowWeights(ir.passes.InPlacePass):
    """Store int8 initializers as int4.

    1. One whose values all fit, and which is only dequantized in blocks, becomes int4.
    2. One that is used otherwise stays: what else engines do with int4 varies. Dequantized as a whole it meets activations
       in 8 bits, and TensorRT multiplies equal types only.
    3. One with a value that does not fit stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        narrow = [value for value in model.graph.initializers.values() if _only_dequantized(value) and _fits(value)]
        for value in narrow:
            codes = value.const_value.numpy()
            value.const_value = ir.tensor(codes.astype(ir.DataType.INT4.numpy()), name=value.name)
            value.dtype = ir.DataType.INT4
        return ir.passes.PassResult(model, bool(narrow))


def _only_dequantized(value: ir.Value) -> bool:
    readers = [node for node, _ in value.uses()]
    blocks = all(node.op_type == "DequantizeLinear" and _block(node) for node in readers)
    return value.dtype == ir.DataType.INT8 and bool(readers) and blocks and value.const_value is not None


def _block(node: ir.Node) -> int:
    size = node.attributes.get("block_size")
    return 0 if size is None else size.as_int()


def _fits(value: ir.Value) -> bool:
    codes, (low, high) = value.const_value.numpy(), code_range(BITS)
    return bool(low <= codes.min() and codes.max() <= high)
