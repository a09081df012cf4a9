"""Constants transposed and reshaped once instead of in every run."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import optimizer

LAYS_OUT = frozenset({"Reshape", "Transpose"})


class LayWeightsOut(ir.passes.InPlacePass):
    """Replace nodes by what they make of a constant.

    1. A Reshape or Transpose of an initializer becomes an initializer; the one before it goes where nothing else needs it.
    2. Those of any other value stay, and so does every other operator: dequantized weights would fill the file with floats.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        folded = optimizer.fold_constants(model, should_fold=lambda node: node.op_type in LAYS_OUT)
        unused = RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(folded.modified or unused.modified))
