"""Packed denoisers as integer graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from diffpress.export.artifact import load_pipeline
from diffpress.export.edits import Pack
from diffpress.export.errors import ArtifactError
from diffpress.export.onnx.check import EPSILON, check_graph
from diffpress.export.onnx.graph import Input, Part, packed_layers, widen_weights_, write_graph
from diffpress.export.onnx.run import OnnxPipeline
from diffpress.export.onnx.sessions import FLOAT_KERNELS, integer_share, kernels_of, open_session, run_session
from diffpress.export.onnx.verify import verify_export
from diffpress.export.runtime import StepClock, attach_clock_, pack_layer

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
FORMATS = [(8, 8), (4, 8), (4, 4)]


class EveryLayer(nn.Module):
    """All layers of one format side by side on the same input, so that none inherits another's rounding."""

    def __init__(self, weight_bits: int, activation_bits: int) -> None:
        super().__init__()
        clock = StepClock([900.0, 400.0, 100.0])
        edit = Pack(component="unet", module="layer", weight_bits=weight_bits, activation_bits=activation_bits)
        layers = [*CONVOLUTIONS.values(), *LINEARS.values()]
        self.layers = nn.ModuleList(pack_layer(layer, edit, clock) for layer in layers)
        generator = torch.Generator().manual_seed(0)
        for layer in packed_layers(self.layers):
            low, high = (0, 256) if layer.weight.dtype == torch.uint8 else (-128, 128)
            codes = torch.randint(low, high, layer.weight.shape, generator=generator)
            layer.weight = codes.to(layer.weight.dtype)
            layer.weight_scale = torch.rand(len(layer.weight), generator=generator) * 0.01 + 0.001
            # Three standard deviations fill the range: some values are cut.
            layer.activation_scale = torch.tensor([1.0, 0.8, 0.6]) * 3 / 2 ** (activation_bits - 1)
            if layer.bias is not None:
                layer.bias = torch.randn(layer.bias.shape, generator=generator)
        attach_clock_(self, clock)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return torch.cat([layer(sample).flatten(1) for layer in self.layers], dim=1)


@pytest.mark.parametrize(("weight_bits", "activation_bits"), FORMATS)
def test_every_layer_equals_torch(tmp_path: Path, weight_bits: int, activation_bits: int) -> None:
    module = EveryLayer(weight_bits, activation_bits).eval()
    with torch.no_grad():
        sample, now = torch.randn(2, CHANNELS, SIDE, SIDE), torch.tensor([650.0])
        packed_output = module(sample, now)
        assert widen_weights_(module) == (8 if weight_bits == 4 else 0)
        assert torch.equal(module(sample, now), packed_output)
    inputs = (
        Input("sample", (CHANNELS, SIDE, SIDE)),
        Input("timestep", (1,), choices=(950.0, 900.0, 650.0, 300.0, 100.0, 3.0)),
    )
    before = [layer.clock.weights.clone() for layer in packed_layers(module)]
    part = Part("layers", module, inputs, "output")
    write_graph(part, tmp_path)
    for layer, weights in zip(packed_layers(module), before, strict=True):
        assert torch.equal(layer.clock.weights, weights)
    agreement = check_graph(part, tmp_path / "layers.onnx", batches=(1, 3, 3, 3, 3, 3))
    # One product each, summed exactly as integers: three roundings.
    assert agreement.relative_error < 3 * EPSILON
    example = {name: value.numpy() for name, value in part.example(2, torch.Generator()).items()}
    assert integer_share(kernels_of(tmp_path / "layers.onnx", example)) == 1
    packed_layers(module)[0].weight_scale *= 1.1
    with pytest.raises(ArtifactError, match="differs from torch"):
        check_graph(part, tmp_path / "layers.onnx")


def test_weights_lie_ready_in_the_graph(packed: Any) -> None:
    model = ir.load(packed.export / "denoiser.onnx")
    large = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.INT8 and value.shape]
    layers = packed_layers(load_pipeline(packed.source).unet)
    assert sum(value.const_value.size for value in large) == sum(
        layer.weight.numel() * 2 for layer in layers if layer.weight.dtype == torch.uint8
    )
    for node in model.graph:
        constant = node.inputs and node.inputs[0] is not None and node.inputs[0].is_initializer()
        assert not (constant and node.op_type in ("Transpose", "Reshape")), node


def test_denoiser_agrees_and_runs_on_integers(packed: Any) -> None:
    graph = packed.manifest.components["denoiser"]
    assert graph.format == "int8"
    assert graph.relative_error < graph.tolerance
    inputs = {
        "sample": np.zeros((2, 4, 8, 8), np.float32),
        "timestep": np.array([500], np.float32),
        "encoder_hidden_states": np.ones((2, 16, 16), np.float32),
    }
    kernels = kernels_of(packed.export / "denoiser.onnx", inputs)
    layers = packed_layers(load_pipeline(packed.source).unet)
    integer = [kernel for kernel in kernels if kernel.operator == "MatMulIntegerToFloat"]
    assert len(integer) == len(layers)
    # What is left in floats are the products of attention, of which no factor is a weight.
    assert {kernel.operator for kernel in kernels} & FLOAT_KERNELS <= {"MatMul", "FusedMatMul"}


def test_the_time_step_moves_the_scales(packed: Any) -> None:
    session = open_session(packed.export / "denoiser.onnx", threads=1)
    unet = load_pipeline(packed.source).unet
    generator = torch.Generator().manual_seed(3)
    sample, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 16, generator=generator)
    for now in (999.0, 750.0, 500.0, 20.0):
        timestep = torch.tensor([now])
        with torch.no_grad():
            expected = unet(sample, timestep, states).sample.numpy()
        inputs = {"sample": sample, "timestep": timestep, "encoder_hidden_states": states}
        found = run_session(session, {name: value.numpy() for name, value in inputs.items()})
        assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < 1 / 128


def test_image_follows_torch_and_verifies(packed: Any) -> None:
    verify_export(packed.export)
    torch_pipeline = load_pipeline(packed.source)
    expected = torch_pipeline(
        "blue square",
        num_inference_steps=packed.manifest.steps,
        guidance_scale=packed.manifest.guidance_scale,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images[0]
    found = OnnxPipeline(packed.export, threads=1).generate("blue square", seed=5)
    assert np.sqrt(np.mean((found - expected) ** 2)) < 0.02
