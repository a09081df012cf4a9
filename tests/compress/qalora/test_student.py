"""The student over its teacher: one set of weights, two answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffpress.calibration.examples import Examples
from diffpress.calibration.sampling import answer, replay
from diffpress.compress.attention import AttentionChoice, learnable
from diffpress.compress.options import Qalora
from diffpress.compress.overlay import overlaid, overriding_attention
from diffpress.compress.qalora.student import BatchClock, Student, lora_scales
from diffpress.compress.qalora.trainer import rate_groups
from diffpress.compress.quantized_layer import Format, QuantizedLayer, fake_quantized
from diffpress.compress.result import QuantizationResult
from diffpress.export.runtime import Int8Attention, StepClock, computes_attention


def options(**chosen: Any) -> Qalora:
    return Qalora(method="qalora", rank=4, **chosen)


@pytest.fixture
def tiny(recorded: Callable[[str], Any], quantized: Callable[..., QuantizationResult]) -> tuple[Any, Student]:
    """A tiny pipeline, and an untrained student of its denoiser with every layer under training but the embeddings."""
    own, found = recorded("tiny_class"), quantized("tiny_class", weights=3, activations=4)
    start = {
        name: layer
        for name, layer in found.layers.items()
        if not isinstance(own.denoiser.get_submodule(name), nn.Embedding)
    }
    return own, Student(own.denoiser, start, own.trajectories.timesteps, options(), 0)


def disturb_(student: Student) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.parameters().items():
            size = {"a": 0.1, "b": 1.0, "zero_point": 0.7}.get(name.rpartition(".")[2], 0.05)
            parameter += size * torch.randn(parameter.shape, generator=generator)


def test_the_whole_student_is_what_it_finishes_as(tiny: tuple[Any, Student]) -> None:
    """A1 for a denoiser: bit for bit, through every layer, as it starts and after some training."""
    own, student = tiny
    for _ in range(2):
        finished = student.finish()
        for call in own.trajectories.calls(own.trajectories.shards[:1]):
            with student.on():
                learned = replay(own.denoiser, call)
            with fake_quantized(own.denoiser, finished, StepClock(own.trajectories.timesteps)):
                assert torch.equal(replay(own.denoiser, call), learned)
            assert not torch.equal(learned, call.output)
        disturb_(student)


@pytest.fixture
def attentive(tiny: tuple[Any, Student]) -> tuple[Any, Student]:
    """The same with one attention on integers, and one whose values are as well."""
    own, plain = tiny
    names = [name for name, module in own.denoiser.named_modules() if computes_attention(module)]
    choices = {name: AttentionChoice(products="all" if index else "scores") for index, name in enumerate(names)}
    plain.attention = learnable(choices)
    return own, plain


def test_a_student_attends_as_its_artifact_will(attentive: tuple[Any, Student]) -> None:
    """Bit for bit, and not as the teacher does."""
    own, student = attentive
    call = next(iter(own.trajectories.calls()))
    stored = [Int8Attention(False), Int8Attention(True)]
    assert len(student.attention) == len(stored)
    layers = student.finish()
    with student.on():
        learned = replay(own.denoiser, call)
        with student.off():
            assert torch.equal(replay(own.denoiser, call), call.output)
        assert torch.equal(replay(own.denoiser, call), learned)
    clock = StepClock(own.trajectories.timesteps)
    with fake_quantized(own.denoiser, layers, clock):
        floats = replay(own.denoiser, call)
        with overlaid(own.denoiser, overriding_attention(dict(zip(student.attention, stored, strict=True))), clock):
            assert torch.equal(replay(own.denoiser, call), learned)
    assert not torch.equal(floats, learned)
    assert torch.equal(replay(own.denoiser, call), call.output)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_pass_through_attention_on_integers(attentive: tuple[Any, Student], checkpointing: bool) -> None:
    own, student = attentive
    student.checkpointing = checkpointing
    call = next(iter(own.trajectories.calls()))
    learned = student.parameters()
    with student.on():
        given = answer(own.denoiser, call.inputs, call.output.dtype)
        before = [name for name in learned if ".to_q." in name or ".to_v." in name]
        gradients = torch.autograd.grad(given.square().sum(), [learned[name] for name in before], allow_unused=True)
    reached = {
        name for name, gradient in zip(before, gradients, strict=True) if gradient is not None and gradient.any()
    }
    wanted = {f"transformer_blocks.{block}.attn1.{part}.b" for block in (0, 1) for part in ("to_q", "to_v")}
    assert wanted <= reached


def test_off_inside_on_is_the_teacher_bit_for_bit(tiny: tuple[Any, Student]) -> None:
    own, student = tiny
    call = next(iter(own.trajectories.calls()))
    with student.on():
        learned = replay(own.denoiser, call)
        with student.off():
            assert torch.equal(replay(own.denoiser, call), call.output)
            with student.off():
                assert torch.equal(replay(own.denoiser, call), call.output)
            assert torch.equal(replay(own.denoiser, call), call.output)
        assert torch.equal(replay(own.denoiser, call), learned)
    assert torch.equal(replay(own.denoiser, call), call.output)
    with student.off():
        assert torch.equal(replay(own.denoiser, call), call.output)
    assert not torch.equal(learned, call.output)


def test_failures_restore_what_was_on(tiny: tuple[Any, Student]) -> None:
    own, student = tiny
    call = next(iter(own.trajectories.calls()))
    with student.on():
        learned = replay(own.denoiser, call)
        with pytest.raises(RuntimeError), student.off():
            raise RuntimeError
        assert torch.equal(replay(own.denoiser, call), learned)
    with pytest.raises(RuntimeError), student.on(), student.off():
        raise RuntimeError
    assert torch.equal(replay(own.denoiser, call), call.output)
    assert not any("forward" in vars(module) for module in own.denoiser.modules())
    assert not any(module._forward_pre_hooks for module in own.denoiser.modules())


def test_parameters_are_named_by_layer_and_kind(tiny: tuple[Any, Student]) -> None:
    _, student = tiny
    parameters = student.parameters()
    assert len({id(parameter) for parameter in parameters.values()}) == len(parameters)
    name = "transformer_blocks.0.attn1.to_q"
    kinds = {key.removeprefix(f"{name}.") for key in parameters if key.startswith(name)}
    assert {"a", "b", "log_weight_scale", "log_activation_scale", "bias"} <= kinds
    # Nothing of the denoiser is among them.
    theirs = {parameter.data_ptr() for parameter in student.denoiser.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in parameters.values()}


def test_same_seed_starts_at_the_same(
    recorded: Callable[[str], Any], quantized: Callable[..., QuantizationResult]
) -> None:
    own, found = recorded("tiny_class"), quantized("tiny_class", weights=3, activations=4)
    name = "transformer_blocks.0.attn1.to_q"
    start = {name: found.layers[name]}
    first, second, other = (
        Student(own.denoiser, start, own.trajectories.timesteps, options(), seed).parameters() for seed in (1, 1, 2)
    )
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert not torch.equal(first[f"{name}.a"], other[f"{name}.a"])


def test_a_batch_of_mixed_steps_gives_each_picture_its_own(
    tiny: tuple[Any, Student], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A3 for a denoiser: each image of a mixed batch against the step it is at.

    Other batches sum in another order, and a code on the other side of a rounding boundary moves everything after it. So:
    most images must agree to the order of summation, and none may with the scales of the first step, which are others.
    """
    own, student = tiny
    disturb_(student)
    with torch.no_grad():
        for layer in student.layers.values():
            if layer.log_activation_scale is not None:
                layer.log_activation_scale[1:] += 2.0
    examples = Examples(own.trajectories, own.trajectories.shards)
    indices = list(range(len(examples)))
    batch = examples.batch(indices)
    with student.on(), torch.no_grad():
        together = answer(own.denoiser, batch.inputs, batch.output.dtype)
        apart, frozen = [], []
        for index in indices:
            single = examples.batch([index])
            apart.append(answer(own.denoiser, single.inputs, single.output.dtype))
        first = own.trajectories.timesteps[0]
        monkeypatch.setattr(student.clock, "set", lambda _: BatchClock.set(student.clock, first))
        for index in indices:
            single = examples.batch([index])
            frozen.append(answer(own.denoiser, single.inputs, single.output.dtype))
    alone, first_scales = (torch.stack(outputs, 1).flatten(0, 1) for outputs in (apart, frozen))
    depth = sum(layer.a.shape[1] for layer in student.layers.values())
    tolerance = depth * torch.finfo(torch.float32).eps * float(alone.abs().max())
    error = (together - alone).abs().flatten(1).amax(1)
    assert (error <= tolerance).float().mean() > 0.5
    later = batch.steps.repeat(2) > 0
    assert ((together - first_scales).abs().flatten(1).amax(1)[later] > tolerance).all()


@pytest.mark.parametrize("timesteps", [[999.0, 666.0, 332.0], [1000.0], [80.0, 12.5, 0.25, 0.0]])
def test_batch_clocks_tell_each_entry_what_a_clock_tells_it(timesteps: list[float]) -> None:
    asked = torch.tensor([*timesteps, 500.0, 700.0, 0.1, -5.0, 2000.0])
    table = torch.randn(len(timesteps), generator=torch.Generator().manual_seed(0))
    batch, single = BatchClock(timesteps), StepClock(timesteps)
    batch.set(asked)
    together = batch.select(table)
    assert together.shape == asked.shape
    for index, timestep in enumerate(asked):
        single.set(timestep)
        # The same two products, summed in another order.
        bound = 2 * torch.finfo(torch.float32).eps * table.abs().max()
        assert (together[index] - single.select(table)[0]).abs() <= bound
        if index < len(timesteps):
            assert together[index] == table[index]
    batch.set(float(timesteps[-1]))
    assert torch.equal(batch.select(table), table[-1:])


class Two(nn.Module):
    """Two layers beside each other, whose weights differ a hundredfold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.small, self.large = nn.Linear(16, 8), nn.Conv2d(4, 8, 3)
        with torch.no_grad():
            self.large.weight *= 100

    def forward(self, x: Tensor, image: Tensor, timestep: float) -> Tensor:
        return self.small(x).square().sum() + self.large(image).square().sum()


def starts(model: Two) -> dict[str, QuantizedLayer]:
    """4 bits over the whole range, inputs in 8."""
    layers = {}
    for name in ("small", "large"):
        weight = model.get_submodule(name).weight.detach()  # type: ignore[union-attr, operator]
        assert isinstance(weight, Tensor)
        scale = weight.flatten(1).abs().amax(1) / 7
        codes = (weight / scale.view(-1, *[1] * (weight.ndim - 1))).round().to(torch.int8)
        layers[name] = QuantizedLayer(Format(4, 8), codes, scale, torch.tensor([0.05, 0.04]))
    return layers


@pytest.mark.parametrize("scale_aware", [True, False])
def test_one_step_moves_each_layer_in_proportion_to_its_weight_scale(scale_aware: bool) -> None:
    """A4. Adam's first step is the rate times g / (|g| + eps): the rate itself to within eps / |g|."""
    model = Two().requires_grad_(False)
    start = starts(model)
    chosen = options(scale_aware=scale_aware, lora_rate=0.01)
    student = Student(model, start, [1.0, 0.0], chosen, 0)
    optimizer = torch.optim.Adam(rate_groups(student.parameters(), chosen))
    x, image = torch.randn(5, 16), torch.randn(5, 4, 6, 6)
    with student.on():
        model(x, image, timestep=1.0).backward()
    optimizer.step()
    moved = {}
    for name, layer in student.layers.items():
        assert layer.b.grad is not None
        used = layer.b.grad != 0
        assert used.any()
        assert layer.b.grad[used].abs().min() > 1e-3
        steps = layer.b.detach()[used].abs()
        assert ((steps / steps.max() - 1).abs() <= 1e-8 / 1e-3 + 4 * torch.finfo(torch.float32).eps).all()
        moved[name] = float(steps.mean() * layer.lora_scale)
    scales = {name: float(own.weight_scale.mean()) for name, own in start.items()}
    assert scales["large"] > 20 * scales["small"]
    expected = scales["large"] / scales["small"] if scale_aware else 1.0
    assert moved["large"] / moved["small"] == pytest.approx(expected, rel=1e-5 + 8 * torch.finfo(torch.float32).eps)


def test_units_are_mean_magnitudes() -> None:
    """Negative scales count by their size, groups like rows."""
    start = {
        "a": QuantizedLayer(Format(4, 8), torch.zeros(2, 3), torch.tensor([-1.0, 3.0])),
        "b": QuantizedLayer(Format(4, None, 8), torch.zeros(2, 3), torch.tensor([[-4.0, 4.0], [8.0, 0.0]])),
    }
    assert lora_scales(start, True) == [2.0, 4.0]
    assert lora_scales(start, False) == [3.0, 3.0]
