from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from diffpress.calibration.conditions import conditions
from diffpress.calibration.observe import observe_inputs, rounded_to
from diffpress.calibration.sampling import Sampling, denoiser_of, replay
from diffpress.calibration.trajectory import Trajectories, record
from diffpress.compress.options import Ptq
from diffpress.compress.overlay import Quantization, fake_quantized
from diffpress.compress.ptq import edits_and_tensors, quantize_denoiser
from diffpress.export.apply import apply_edits_
from diffpress.export.artifact import load_pipeline
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.folder import PipelineFolder
from diffpress.export.runtime import StepClock
from diffpress.kernels import quantize


@pytest.fixture(scope="module", params=["tiny_text", "tiny_class", "tiny_pixels"])
def recorded(request, tmp_path_factory) -> tuple[Path, Trajectories]:
    """A tiny pipeline and four recorded runs of it."""
    folder = request.getfixturevalue(request.param)
    pipeline = load_pipeline(PipelineFolder(folder, "tiny"))
    wanted = conditions(pipeline, "builtin", 4, 0)
    return folder, record(pipeline, wanted, Sampling(3), tmp_path_factory.mktemp("recorded"), batch=2)


def open_denoiser(folder: Path) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    source = PipelineFolder(folder, "tiny")
    return denoiser_of(load_pipeline(source)), dict(source.tensors(source.denoiser))


@pytest.mark.parametrize(("weights", "activations"), [(8, 8), (4, 8), (4, 4)])
def test_packed_layers_compute_what_fake_quantization_measured(recorded, weights, activations):
    """Layer by layer on the same input: the same codes, and sums that are exact in int32 against sums in float64.

    What is left are float32 roundings of the sum, of the product of scales, of their product, and of the added bias: four
    half-units of the largest value that occurs. (Whole denoisers may not be held to this: one code that lands on the other
    side of a rounding boundary moves everything after it.)
    """
    folder, trajectories = recorded
    denoiser, stored = open_denoiser(folder)
    options = Ptq(method="ptq", weights=weights, activations=activations)
    result = quantize_denoiser(denoiser, stored, trajectories, options, seed=0)
    originals = {name: denoiser.get_submodule(name) for name in result.layers}
    edits, tensors = edits_and_tensors("denoiser", result.layers)
    clock = apply_edits_(denoiser, edits, trajectories.timesteps)
    assert not denoiser.load_state_dict({**stored, **tensors}, strict=False).unexpected_keys
    inputs: dict[str, torch.Tensor] = {}
    for name in result.layers:
        layer = denoiser.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, arguments, name=name: inputs.setdefault(name, arguments[0]))
    replay(denoiser, next(iter(trajectories.calls())))
    for name, quantization in result.layers.items():
        packed, original = denoiser.get_submodule(name)(inputs[name]), originals[name].double()
        scale = clock.select(quantization.activation_scale)
        codes = quantize(inputs[name], scale, quantization.activation_bits)
        shape = (-1, *[1] * (original.weight.ndim - 1))
        original.weight.data = quantization.codes.double() * quantization.weight_scale.double().view(shape)
        with torch.no_grad():
            simulated = original(codes.double() * scale.double())
        bias = 0.0 if original.bias is None else float(original.bias.detach().abs().max())
        tolerance = 4 * 2**-24 * (float(simulated.abs().max()) + bias)
        assert (packed - simulated).abs().max() <= tolerance, name


def test_overlay_leaves_no_trace(recorded):
    folder, trajectories = recorded
    denoiser, stored = open_denoiser(folder)
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    result = quantize_denoiser(denoiser, stored, trajectories, Ptq(method="ptq", weights=4, activations=4), seed=0)
    call = next(iter(trajectories.calls()))
    teacher = replay(denoiser, call)
    with fake_quantized(denoiser, result.layers, StepClock(trajectories.timesteps)):
        assert not torch.equal(replay(denoiser, call), teacher)
    assert torch.equal(replay(denoiser, call), teacher)
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())
    assert not any(module._forward_pre_hooks for module in denoiser.modules())


def test_overlay_is_removed_when_the_body_fails(recorded):
    folder, trajectories = recorded
    denoiser, stored = open_denoiser(folder)
    result = quantize_denoiser(denoiser, stored, trajectories, Ptq(method="ptq"), seed=0)
    call = next(iter(trajectories.calls()))
    teacher = replay(denoiser, call)
    with pytest.raises(RuntimeError), fake_quantized(denoiser, result.layers, StepClock(trajectories.timesteps)):
        raise RuntimeError
    assert torch.equal(replay(denoiser, call), teacher)


def test_more_bits_lose_less(recorded):
    folder, trajectories = recorded
    denoiser, stored = open_denoiser(folder)
    results = []
    for weights, activations in ((8, 8), (4, 8), (4, 4)):
        options = Ptq(method="ptq", weights=weights, activations=activations)
        results.append(quantize_denoiser(denoiser, stored, trajectories, options, seed=0))
    as_asked = [name for name, layer in results[-1].layers.items() if layer.weight_bits == 4]
    errors = [sum(result.sensitivity[name] for name in as_asked) for result in results]
    assert errors[0] < errors[1] < errors[2]


def test_same_seed_finds_the_same_integers(recorded):
    folder, trajectories = recorded
    denoiser, stored = open_denoiser(folder)
    options = Ptq(method="ptq", weights=4)
    first, second = (quantize_denoiser(denoiser, stored, trajectories, options, seed=3).layers for _ in range(2))
    for name, layer in first.items():
        assert torch.equal(layer.codes, second[name].codes)
        assert torch.equal(layer.activation_scale, second[name].activation_scale)


def test_every_layer_is_either_quantized_or_has_a_reason(recorded):
    folder, trajectories = recorded
    denoiser, stored = open_denoiser(folder)
    result = quantize_denoiser(denoiser, stored, trajectories, Ptq(method="ptq", weights=4), seed=0)
    for name, module in denoiser.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert name in result.layers or result.reasons[name]
    assert set(result.sensitivity) == set(result.layers)


def test_observed_ranges_are_those_of_the_inputs(recorded):
    folder, trajectories = recorded
    denoiser, _ = open_denoiser(folder)
    name, layer = next((n, m) for n, m in denoiser.named_modules() if isinstance(m, nn.Conv2d))
    seen = observe_inputs(denoiser, {name: layer}, trajectories)[name]
    for step in range(len(trajectories.timesteps)):
        inputs = [
            call.inputs.get("sample", call.inputs.get("hidden_states"))
            for call in trajectories.calls()
            if call.step == step
        ]
        assert seen.largest[step] == max(float(x.abs().max()) for x in inputs)
    everything = torch.cat([c.inputs.get("sample", c.inputs.get("hidden_states")) for c in trajectories.calls()])
    assert torch.allclose(seen.second_moment, everything.square().mean((0, 2, 3)), rtol=1e-5)


def test_denoiser_without_layers_is_refused(recorded):
    _, trajectories = recorded
    with pytest.raises(UnsupportedModelError, match="has no Linear or Conv2d"):
        quantize_denoiser(nn.Identity(), {}, trajectories, Ptq(method="ptq"), seed=0)


def test_rounded_to_is_quantize_then_dequantize():
    values = torch.tensor([0.24, 0.26, -3.0, 9.0, 0.25])
    assert rounded_to(values, torch.tensor([0.5]), 4).tolist() == [0.0, 0.5, -3.0, 3.5, 0.0]


def test_quantization_weight_undoes_its_codes():
    codes = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8)
    layer = Quantization(8, 8, codes, torch.tensor([0.5, 2.0]), torch.ones(1))
    assert layer.weight().tolist() == [[0.5, -1.0], [6.0, 8.0]]
