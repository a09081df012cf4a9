"""Packed denoisers as integer graphs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from diffpress.export.artifact import load_pipeline
from diffpress.export.edits import Pack
from diffpress.export.engines.onnxruntime import FLOAT_KERNELS, FOLDED, ONNXRUNTIME, integer_share, kernels_of
from diffpress.export.engines.openvino import OpenVino
from diffpress.export.onnx.check import check_graph, rounding_of
from diffpress.export.onnx.part import Input, Part, packed_layers
from diffpress.export.onnx.passes import widen_weights_
from diffpress.export.onnx.rounding import EPSILON
from diffpress.export.onnx.write import write_graph
from diffpress.export.portable.manifest import SCHEMA, read_export
from diffpress.export.portable.pipeline import PortablePipeline
from diffpress.export.portable.verify import verify_export
from diffpress.export.runtime import PackedConv2d, PackedLayer, StepClock, attach_clock_, pack_layer
from diffpress.kernels import FP8_MAX

CHANNELS, SIDE = 5, 9
CONVOLUTIONS = {
    "3x3": nn.Conv2d(CHANNELS, 6, 3, padding=1),
    "1x1": nn.Conv2d(CHANNELS, 6, 1),
    "1x1 stride 2": nn.Conv2d(CHANNELS, 6, 1, stride=2, bias=False),
    "3x3 stride 2": nn.Conv2d(CHANNELS, 7, 3, stride=2, padding=1),
    "2x3 uneven": nn.Conv2d(CHANNELS, 4, (2, 3), stride=(2, 1), padding=(0, 2)),
    "3x3 dilated": nn.Conv2d(CHANNELS, 4, 3, padding=2, dilation=2),
}
LINEARS = {"linear": nn.Linear(SIDE, 12), "linear without bias": nn.Linear(SIDE, 3, bias=False)}
FORMATS: dict[str, dict[str, Any]] = {
    "W8A8": {"weight_bits": 8, "activation_bits": 8},
    "W4A8": {"weight_bits": 4, "activation_bits": 8},
    "W4A4": {"weight_bits": 4, "activation_bits": 4, "asymmetric": True},
    "W3A6": {"weight_bits": 3, "activation_bits": 6, "asymmetric": True, "smoothed": True},
    "W2 g8": {"weight_bits": 2, "activation_bits": None, "group_size": 8},
    "W8 g16": {"weight_bits": 8, "activation_bits": None, "group_size": 16, "smoothed": True},
    "FP8": {"weight_bits": 8, "activation_bits": 8, "float8": True, "smoothed": True},
}
STORED = {
    **{"W8A8": ir.DataType.UINT8, "W4A8": ir.DataType.UINT4, "W4A4": ir.DataType.UINT4, "W3A6": ir.DataType.UINT4},
    **{"W2 g8": ir.DataType.INT4, "W8 g16": ir.DataType.INT8, "FP8": ir.DataType.FLOAT8E4M3FN},
}
"""What weights are in the file."""
SAMPLE_AND_TIME = (
    Input("sample", (CHANNELS, SIDE, SIDE)),
    Input("timestep", (1,), choices=(950.0, 900.0, 650.0, 300.0, 100.0, 3.0)),
)


class EveryLayer(nn.Module):
    """All layers of one format side by side on the same input, so that none inherits another's rounding."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        clock = StepClock([900.0, 400.0, 100.0])
        edit = Pack(component="unet", module="layer", **options)
        layers = [*CONVOLUTIONS.values(), *LINEARS.values()]
        self.layers = nn.ModuleList(pack_layer(layer, edit, clock) for layer in layers)
        generator = torch.Generator().manual_seed(0)
        for layer in packed_layers(self.layers):
            fill_(layer, generator)
        attach_clock_(self, clock)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return torch.cat([layer(sample).flatten(1) for layer in self.layers], dim=1)


def fill_(layer: PackedLayer, generator: torch.Generator) -> None:
    """Give a packed layer random tensors."""
    if layer.edit.float8:
        layer.weight = torch.randn(layer.weight.shape, generator=generator).to(torch.float8_e4m3fn)
    else:
        layer.weight.random_(generator=generator)
    layer.weight_scale.uniform_(0.001, 0.011, generator=generator)
    if layer.edit.activation_bits is not None:
        # Three standard deviations fill the range: some values are cut.
        codes = FP8_MAX if layer.edit.float8 else 2 ** (layer.edit.activation_bits - 1)
        layer.activation_scale.copy_(torch.tensor([1.0, 0.8, 0.6]) * 3 / codes)
    if layer.zero_point is not None:
        layer.zero_point.copy_(torch.tensor([-3.7, 2.2, 5.1]))
    if layer.smoothing is not None:
        layer.smoothing.uniform_(0.5, 1.5, generator=generator)
    if layer.bias is not None:
        layer.bias.normal_(generator=generator)


TWINS = ("W3A6", "W8 g16", "W4A8")
"""Formats whose graphs are those of others but for the numbers in them."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in TWINS else name for name in FORMATS]
)
def test_every_layer_equals_torch(tmp_path: Path, name: str) -> None:
    module = EveryLayer(FORMATS[name]).eval()
    bits, rounds_to_integers = FORMATS[name]["weight_bits"], "A" in name
    with torch.no_grad():
        sample, now = torch.randn(2, CHANNELS, SIDE, SIDE), torch.tensor([650.0])
        packed_output = module(sample, now)
        assert widen_weights_(module) == (bits < 8)
        assert torch.equal(module(sample, now), packed_output)
    before = [layer.clock.weights.clone() for layer in packed_layers(module)]
    part = Part("layers", module, SAMPLE_AND_TIME, "output")
    places = write_graph(part, tmp_path, ONNXRUNTIME.form)
    for layer, weights in zip(packed_layers(module), before, strict=True):
        assert torch.equal(layer.clock.weights, weights)
    graph = tmp_path / "layers.onnx"
    agreement = check_graph(part, graph, places, ONNXRUNTIME, batches=(1, 3, 3, 3, 3, 3))
    # One product each, summed exactly as integers: three roundings. Floats are summed in another order.
    bound = 3 * EPSILON if rounds_to_integers else rounding_of(part)
    assert agreement.relative_error < bound
    weights = [value for value in ir.load(graph).graph.initializers.values() if value.dtype != ir.DataType.FLOAT]
    stored = {value.dtype for value in weights if value.const_value.size > CHANNELS}
    assert stored - {ir.DataType.INT64} == {STORED[name]}
    if name != "FP8":
        # Which OpenVINO rounds to by way of float16.
        found = check_graph(part, graph, places, OpenVino(), batches=(1, 3, 3))
        assert found.relative_error < bound
    example = {name: value.numpy() for name, value in part.example(2, torch.Generator()).items()}
    assert integer_share(kernels_of(graph, example)) == (1 if rounds_to_integers else 0)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "W4A4" else pytest.mark.long) for name in FORMATS if "A" in name]
)
def test_folded_layers_equal_torch(tmp_path: Path, name: str) -> None:
    module = EveryLayer(FORMATS[name]).eval()
    widen_weights_(module)
    part = Part("layers", module, SAMPLE_AND_TIME, "output")
    places = write_graph(part, tmp_path, FOLDED.form)
    agreement = check_graph(part, tmp_path / "layers.onnx", places, FOLDED, batches=(1, 3, 3))
    assert agreement.relative_error < 3 * EPSILON
    stored = {value.dtype for value in ir.load(tmp_path / "layers.onnx").graph.initializers.values()}
    assert ir.DataType.INT8 in stored
    # TensorRT has integers in 4 bits for weights alone.
    assert not stored & {ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.UINT8}


class Embeddings(nn.Module):
    """Rows of two packed embeddings, added and fed to a packed layer, without any clock."""

    def __init__(self) -> None:
        super().__init__()
        formats = {3: nn.Embedding(20, 10), 8: nn.Embedding(20, 10), 4: nn.Linear(10, 6)}
        options = {"component": "text_encoder", "module": "layer", "activation_bits": None, "group_size": 4}
        self.layers = nn.ModuleList(
            pack_layer(layer, Pack(weight_bits=bits, **options), None) for bits, layer in formats.items()
        )
        for layer in packed_layers(self.layers):
            fill_(layer, torch.Generator().manual_seed(0))

    def forward(self, input_ids: Tensor) -> Tensor:
        first, second, linear = self.layers
        return linear(first(input_ids) + second(input_ids))


def test_embeddings_equal_torch_and_stay_integers(tmp_path: Path) -> None:
    module = Embeddings().eval()
    assert widen_weights_(module)
    part = Part("text_encoder", module, (Input("input_ids", (7,), below=20),), "states")
    places = write_graph(part, tmp_path, ONNXRUNTIME.form)
    for engine in (ONNXRUNTIME, OpenVino()):
        agreement = check_graph(part, tmp_path / "text_encoder.onnx", places, engine)
        assert agreement.relative_error < rounding_of(part)
    values = ir.load(tmp_path / "text_encoder.onnx").graph.initializers.values()
    large = [(value.dtype, value.const_value.size) for value in values if value.const_value.size >= 60]
    scales = [(ir.DataType.FLOAT, 60)] * 2
    assert sorted(large) == sorted([(ir.DataType.INT8, 200), (ir.DataType.INT8, 200), (ir.DataType.INT4, 60), *scales])


def test_weights_lie_ready_in_the_graph(packed: Any) -> None:
    model = ir.load(packed.export / "denoiser.onnx")
    large = [value.const_value for value in model.graph.initializers.values() if value.dtype == ir.DataType.UINT4]
    layers = packed_layers(load_pipeline(packed.source).unet)
    assert sum(tensor.size for tensor in large) == sum(len(layer.weight) * layer.columns for layer in layers)
    assert all(tensor.nbytes == math.ceil(tensor.size / 2) for tensor in large)
    for node in model.graph:
        constant = node.inputs and node.inputs[0] is not None and node.inputs[0].is_initializer()
        assert not (constant and node.op_type in ("Transpose", "Reshape")), node


def test_denoiser_runs_on_integers(packed: Any) -> None:
    assert packed.manifest.components["denoiser"].format == "int8"
    unet = load_pipeline(packed.source).unet
    inputs = {
        "sample": np.zeros((2, unet.config.in_channels, 8, 8), np.float32),
        "timestep": np.array([500], np.float32),
    }
    if packed.kind == "prompt":
        inputs["encoder_hidden_states"] = np.ones((2, 16, 16), np.float32)
    kernels = kernels_of(packed.export / "denoiser.onnx", inputs)
    integer = [kernel for kernel in kernels if kernel.operator == "MatMulIntegerToFloat"]
    assert len(integer) == len(packed_layers(unet))
    # What is left in floats are the products of attention, of which no factor is a weight.
    assert {kernel.operator for kernel in kernels} & FLOAT_KERNELS <= {"MatMul", "FusedMatMul"}


def test_image_follows_torch_and_verifies(packed: Any) -> None:
    verify_export(packed.export, ONNXRUNTIME)
    torch_pipeline, test = load_pipeline(packed.source), packed.manifest.self_test
    guided = {"prompt": "blue square", "guidance_scale": packed.manifest.guidance_scale}
    expected = torch_pipeline(
        **(guided if packed.kind == "prompt" else {}),
        num_inference_steps=test.steps,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images[0]
    condition = guided["prompt"] if packed.kind == "prompt" else ""
    image = PortablePipeline(packed.export, ONNXRUNTIME, threads=1).generate(condition, seed=5, steps=test.steps)
    # Derived for as many steps of another image.
    assert np.sqrt(np.mean((image - expected) ** 2)) < test.tolerance


def test_the_manifest_says_which_form_was_written_and_why(packed: Any) -> None:
    manifest = read_export(packed.export)
    assert (manifest.schema_version, manifest.form) == (SCHEMA, "uint8 x uint8")
    assert "x86 without VNNI" in manifest.form_reason
    assert manifest.worst_case in manifest.files


def test_the_manifest_says_what_ran_in_integers(packed: Any) -> None:
    kernels = packed.manifest.components["denoiser"].kernels
    assert kernels is not None
    assert kernels.integer == len(packed_layers(load_pipeline(packed.source).unet))
    assert kernels.by_operator["MatMulIntegerToFloat"] == kernels.integer
    assert sum(kernels.by_operator.values()) == kernels.integer + kernels.floating
    checked = packed.manifest.checked
    assert (checked.engine, checked.version) == ("onnxruntime", ONNXRUNTIME.version())
    assert checked.settings == ONNXRUNTIME.settings


def test_openvino_says_which_kernels_ran(packed: Any) -> None:
    ports = packed.manifest.components["denoiser"].inputs
    example = {
        port.name: np.ones([2 if size == "batch" else size for size in port.shape], np.float32) for port in ports
    }
    engine = OpenVino()
    found = engine.kernels(packed.export / "denoiser.onnx", example, threads=1)
    layers = packed_layers(load_pipeline(packed.source).unet)
    exact = engine.exact_products()
    assert found.integer == sum(
        bool(exact.conv2d if isinstance(layer, PackedConv2d) else exact.linear) for layer in layers
    )


def test_openvino_is_given_no_other_shape(packed: Any) -> None:
    session = OpenVino().open(packed.export / "denoiser.onnx")
    name = session.compiled.inputs[0].any_name
    with pytest.raises(ValueError, match=rf"the input {name} is \[2, 9, 9, 9\], the graph takes"):
        session.run({name: np.zeros((2, 9, 9, 9), np.float32)})
