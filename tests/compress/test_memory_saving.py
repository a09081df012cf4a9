"""What saves memory: the same numbers, and on where it should be."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from diffpress.calibration.examples import Batch, Examples
from diffpress.calibration.sampling import answer
from diffpress.compress import overlay
from diffpress.compress.checkpoint import Progress, load_checkpoint, save_checkpoint
from diffpress.compress.options import Qalora
from diffpress.compress.qalora import layer as layers
from diffpress.compress.qalora.layer import QaloraLayer
from diffpress.compress.qalora.optimizer import make_optimizer
from diffpress.compress.qalora.student import BatchClock, Student
from diffpress.compress.quantized_layer import Format, QuantizedLayer
from diffpress.compress.result import QuantizationResult
from diffpress.export.errors import UserError

EPS = torch.finfo(torch.float32).eps


def student_of(own: Any, found: QuantizationResult, checkpointing: bool | None) -> Student:
    """Untrained but for B, which gives A a gradient."""
    options = Qalora(method="qalora", rank=4, checkpointing=checkpointing)
    start = {
        name: layer
        for name, layer in found.layers.items()
        if not isinstance(own.denoiser.get_submodule(name), nn.Embedding)
    }
    student = Student(own.denoiser, start, own.trajectories.timesteps, options, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in student.layers.values():
            layer.b += torch.randn(layer.b.shape, generator=generator)
    return student


def gradients(student: Student, batch: Batch) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The denoiser is others' too: none of it gets a gradient."""
    parameters = student.parameters()
    with student.on():
        output = answer(student.denoiser, batch.inputs, batch.output.dtype)
        loss = (output - batch.output).square().mean()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return output.detach(), dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize("source", ["tiny_text", "tiny_class", "tiny_pixels"])
def test_checkpointing_gives_the_same_gradients_bit_for_bit(
    source: str,
    recorded: Callable[[str], Any],
    quantized: Callable[..., QuantizationResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a batch of mixed steps, so that a clock that stands elsewhere on the way back is noticed."""
    own, found = recorded(source), quantized(source, weights=4, activations=4)
    examples = Examples(own.trajectories, own.trajectories.shards)
    batch = examples.batch(range(0, len(examples), 3))
    assert len(batch.steps.unique()) > 1
    kept, expected = gradients(student_of(own, found, False), batch)
    calls: list[nn.Module] = []
    forward = QaloraLayer.forward

    def counted(self: QaloraLayer, layer: nn.Module, *arguments: Any) -> Tensor:
        calls.append(layer)
        return forward(self, layer, *arguments)

    monkeypatch.setattr(QaloraLayer, "forward", counted)
    student = student_of(own, found, True)
    again, found_gradients = gradients(student, batch)
    assert torch.equal(again, kept)
    assert len(calls) > 2 * len(student.layers)
    assert not own.denoiser.is_gradient_checkpointing
    for name, gradient in expected.items():
        other = found_gradients[name]
        assert (other is None) == (gradient is None), name
        assert gradient is None or torch.equal(other, gradient), name
    assert any(gradient is not None and gradient.any() for gradient in expected.values())


def test_checkpointing_of_the_denoisers_own_stays_on(
    recorded: Callable[[str], Any], quantized: Callable[..., QuantizationResult]
) -> None:
    own = recorded("tiny_text")
    own.denoiser.enable_gradient_checkpointing()
    try:
        with student_of(own, quantized("tiny_text", weights=4, activations=4), True).on():
            assert own.denoiser.is_gradient_checkpointing
        assert own.denoiser.is_gradient_checkpointing
    finally:
        own.denoiser.disable_gradient_checkpointing()


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_weight_in_parts_is_the_whole_weight(
    kind: str, group_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each output is the same sum; gradients of what the parts share are added in another order."""
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(20, 7) if kind == "linear" else nn.Conv2d(5, 7, (3, 2), padding=1)
    x = torch.randn(6, 5, 20) if kind == "linear" else torch.randn(6, 5, 9, 8)
    weight = layer.weight.detach()
    assert isinstance(weight, Tensor)
    columns = weight[0].numel()
    scale = torch.rand(7) + 0.05 if group_size is None else torch.rand(7, -(-columns // group_size)) + 0.05
    activation_scale = None if group_size else torch.tensor([0.5, 0.25])
    start = QuantizedLayer(
        Format(4, None if group_size else 4, group_size), weight.to(torch.int8), scale, activation_scale
    )
    learned = QaloraLayer(layer, start, 3, 0.1, True, torch.Generator().manual_seed(0))
    nn.init.normal_(learned.b)
    clock = BatchClock([1.0, 0.0])
    clock.set(torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.5]))

    def run(forward: Callable[..., Tensor]) -> list[Tensor]:
        learned.zero_grad()
        inputs = x.clone().requires_grad_()
        output = forward(layer, inputs, clock)
        output.square().sum().backward()
        return [output.detach(), *(value.grad for value in (inputs, *learned.parameters()) if value.grad is not None)]

    whole = run(learned.forward)
    # Two of the seven rows at a time: parts of unlike size.
    monkeypatch.setattr(layers, "PART", 2 * columns)
    for part, expected in zip(run(learned.forward_in_parts), whole, strict=True):
        assert (part - expected).abs().max() <= x.numel() * EPS * expected.abs().max()


def test_left_out_it_is_on_for_large_denoisers(
    recorded: Callable[[str], Any], quantized: Callable[..., QuantizationResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, found = recorded("tiny_text"), quantized("tiny_text", weights=4, activations=4)
    assert not student_of(own, found, None).checkpointing
    assert student_of(own, found, True).checkpointing
    monkeypatch.setattr(overlay, "LARGE", sum(parameter.numel() for parameter in own.denoiser.parameters()))
    assert student_of(own, found, None).checkpointing
    assert not student_of(own, found, False).checkpointing


@pytest.mark.parametrize("value", ["sometimes", 2, []])
def test_it_is_on_off_or_left_out(value: object) -> None:
    with pytest.raises(ValidationError, match="checkpointing"):
        Qalora.model_validate({"method": "qalora", "checkpointing": value})


def three_steps(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], first: int) -> None:
    for step in range(first, first + 3):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def made(name: str, large: bool) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """One parameter of a size whose state is kept in 8 bits, one that is too small for it."""
    parameters = {"layer.a": nn.Parameter(torch.ones(128, 64)), "layer.b": nn.Parameter(torch.ones(7))}
    groups = [
        {"params": [parameter], "lr": rate} for parameter, rate in zip(parameters.values(), (0.1, 0.2), strict=True)
    ]
    return parameters, make_optimizer(name, groups, large)


@pytest.mark.parametrize(("name", "large"), [("adam", False), ("adam", True), ("adam8bit", True)])
def test_every_optimizer_goes_on_from_a_checkpoint(name: str, large: bool, tmp_path: Path) -> None:
    if name == "adam8bit":
        pytest.importorskip("bitsandbytes", reason="the extra gpu is not installed")
    parameters, optimizer = made(name, large)
    three_steps(optimizer, parameters, 0)
    average = {name: torch.randn(value.shape) for name, value in parameters.items()}
    save_checkpoint(tmp_path / "file", parameters, average, optimizer, Progress(3))
    three_steps(optimizer, parameters, 3)
    resumed, other = made(name, large)
    read = {name: torch.zeros_like(value) for name, value in average.items()}
    assert load_checkpoint(tmp_path / "file", resumed, read, other) == Progress(3)
    three_steps(other, resumed, 3)
    for key, value in parameters.items():
        assert torch.equal(resumed[key], value)
        assert torch.equal(read[key], average[key])


def test_the_missing_optimizer_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"adam8bit .* pip install 'diffpress\[gpu\]'"):
        made("adam8bit", False)
