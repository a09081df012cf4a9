"""onnxruntime's own quantizers, as its documentation advises for x86 with VNNI.

W8A8 and W4A8 are static QDQ of every convolution and matrix product: unsigned activations between the recorded extremes,
signed weights per channel. Entropy and percentile ranges did no better, moving averages worse, and more operators in integers
far worse. Outputs of matrix products stay floats: better, and the fused integer kernel gives them for free.
w4 is MatMulNBits, asymmetric in blocks of 32, on matrix products: convolutions are not offered, and embeddings in 4 bits cost
4 dB. HQQ did no better on the whole. Float weights stay float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from graph import Arrays, StandIn, arrays, export
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.shape_inference import quant_pre_process
from task import QuantizationResult, Record
from torch import nn

BLOCK = 32
WEIGHTS = {"W8A8": QuantType.QInt8, "W4A8": QuantType.QInt4}
MATRIX_OPERATORS = ["MatMul", "Gemm"]
INTEGERS = {ir.DataType.INT8, ir.DataType.INT4}


class Reader(CalibrationDataReader):
    """Recorded inputs, one call after the other."""

    def __init__(self, calls: Iterable[Arrays]) -> None:
        self._calls = iter(calls)

    def get_next(self) -> Arrays | None:
        return next(self._calls, None)


def quantize(denoiser: nn.Module, bits: str, record: Record, work: Path) -> QuantizationResult:
    """Export, quantize and open the denoiser."""
    calls = record()
    source, prepared, result = (work / f"{name}.onnx" for name in ("float", "prepared", "quantized"))
    export(denoiser, calls[0], source)
    # Symbolic inference of shapes gives up on UNets; where it works it changes nothing.
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    if bits in WEIGHTS:
        write_static(prepared, result, WEIGHTS[bits], map(arrays, calls))
    else:
        write_weight_only(prepared, result)
    session = open_session(result)
    stand_in = StandIn(denoiser, lambda inputs: session.run(None, inputs)[0])
    model = ir.load(result)
    return QuantizationResult(stand_in, weight_bytes(model), quantized_numbers(model), simulated=False)


def write_static(source: Path, result: Path, weights: QuantType, calls: Iterable[Arrays]) -> None:
    quantize_static(
        str(source),
        str(result),
        Reader(calls),
        op_types_to_quantize=["Conv", *MATRIX_OPERATORS],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=weights,
        extra_options={"OpTypesToExcludeOutputQuantization": MATRIX_OPERATORS},
    )


def write_weight_only(source: Path, result: Path) -> None:
    graph = ONNXModel(onnx.load(source))
    graph.replace_gemm_with_matmul()
    quantizer = MatMulNBitsQuantizer(graph.model, algo_config=DefaultWeightOnlyQuantConfig(block_size=BLOCK))
    quantizer.process()
    quantizer.model.save_model_to_file(str(result))


def open_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # This fusion takes product and bias away from the fusion into an integer kernel, which is much faster.
    return onnxruntime.InferenceSession(path, options, disabled_optimizers=["MatMulAddFusion"])


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all tensors in the file."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values())


def quantized_numbers(model: ir.Model) -> int:
    """How many weights are stored as integers."""
    stored = [value.const_value for value in model.graph.initializers.values()]
    plain = sum(tensor.size for tensor in stored if tensor.dtype in INTEGERS and len(tensor.shape) > 1)
    blocks = [node.attributes for node in model.graph if node.op_type == "MatMulNBits"]
    return plain + sum(prod(node[name].value for name in ("K", "N")) for node in blocks)
