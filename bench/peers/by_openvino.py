"""NNCF on OpenVINO, computed by OpenVINO in float32 where it is not quantized.

W8A8 is `nncf.quantize` for transformers (asymmetric activations, SmoothQuant, fast bias correction) over the full range of 8
bits, as NNCF advises for processors with VNNI. The slow bias correction took ten times as long and did no better.
w4 is `nncf.compress_weights`: 4 bits for matrix products, symmetric in groups of 32 or what divides, and NNCF's own choice of
8 bits for convolutions, embeddings and the last layer. Asymmetric groups and AWQ did no better, scale estimation destroyed
the images. W4A8 is the same model with OpenVINO's dynamic quantization of what enters matrix products.
"""

from __future__ import annotations

import sys
from math import prod
from pathlib import Path
from typing import Any

import torch
from graph import Arrays, StandIn, arrays, export
from numpy.typing import NDArray
from task import QuantizationResult, Record
from torch import nn

# Both report their use to their makers where they find this package.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
import nncf  # noqa: E402
import openvino  # noqa: E402

GROUP = 32
SMALLEST_GROUP = 16
INTEGERS = {"i8", "u8", "i4", "u4"}
ZERO_POINT = "zero_point"
"""In the names that NNCF gives to what is no weight."""


def quantize(denoiser: nn.Module, bits: str, record: Record, work: Path) -> QuantizationResult:
    """Export, quantize, store and compile the denoiser."""
    calls = record()
    source, result = work / "float.onnx", work / "quantized.xml"
    export(denoiser, calls[0], source)
    model = openvino.Core().read_model(source)
    model = quantize_statically(model, list(map(arrays, calls))) if bits == "W8A8" else compress_weights(model)
    openvino.save_model(model, result)
    stand_in = StandIn(denoiser, runner(result, dynamic_group=GROUP if bits == "W4A8" else 0))
    return QuantizationResult(
        stand_in, result.with_suffix(".bin").stat().st_size, quantized_numbers(model), simulated=False
    )


def quantize_statically(model: openvino.Model, calls: list[Arrays]) -> openvino.Model:
    return nncf.quantize(
        model,
        nncf.Dataset(calls),
        model_type=nncf.ModelType.TRANSFORMER,
        target_device=nncf.TargetDevice.CPU,
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.DISABLE),
    )


def compress_weights(model: openvino.Model) -> openvino.Model:
    return nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=GROUP,
        advanced_parameters=nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST, min_adjusted_group_size=SMALLEST_GROUP
        ),
    )


def runner(path: Path, dynamic_group: int) -> Any:
    """A function from inputs to the denoiser's answer."""
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": dynamic_group,
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()

    def run(inputs: Arrays) -> NDArray[Any]:
        # The request's own memory is overwritten by the next call.
        return request.infer(inputs)[0].copy()

    return run


def quantized_numbers(model: openvino.Model) -> int:
    """How many weights are stored as integers."""
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    weights = [
        node
        for node in constants
        if node.get_element_type().get_type_name() in INTEGERS and ZERO_POINT not in node.get_friendly_name()
    ]
    return sum(prod(node.shape) for node in weights if len(node.shape) > 1)
