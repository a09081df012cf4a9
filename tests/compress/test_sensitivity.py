"""Errors of single modules, estimated for all at once, beside the same measured one at a time."""

from __future__ import annotations

from collections.abc import Callable
from math import log, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffpress.calibration.sampling import Call
from diffpress.compress import overlay, sensitivity
from diffpress.compress.overlay import overlaid, overriding_attention
from diffpress.compress.quantized_layer import Format, QuantizedLayer, fake_quantized
from diffpress.compress.result import QuantizationResult
from diffpress.compress.sensitivity import PRODUCTS, evaluation_calls, measure_attention, measure_layers
from diffpress.export.runtime import Int8Attention, StepClock, computes_attention

CONVOLUTIONS = {"keep": ["down_blocks.*", "up_blocks.*"]}
CASES = [("tiny_class", {}), ("tiny_text", CONVOLUTIONS), ("tiny_pixels", CONVOLUTIONS)]


def linear_layers(own: Any, found: QuantizationResult) -> dict[str, QuantizedLayer]:
    names = [name for name in found.layers if not isinstance(own.denoiser.get_submodule(name), nn.Embedding)]
    return {name: found.layers[name] for name in names}


def one_at_a_time(own: Any, layers: dict[str, QuantizedLayer], output_error: Callable[..., float]) -> dict[str, float]:
    """The error itself, by a run of the denoiser with each layer rounded."""
    errors = {}
    for name, layer in layers.items():
        with fake_quantized(own.denoiser, {name: layer}, StepClock(own.trajectories.timesteps)):
            errors[name] = output_error(own.denoiser, own.trajectories)
    return errors


def ranks(values: list[float]) -> Tensor:
    return torch.tensor(values).argsort().argsort().double()


@pytest.mark.parametrize("bits", [(8, 8), (4, 4)], ids=str)
@pytest.mark.parametrize(("source", "options"), CASES, ids=[source for source, _ in CASES])
def test_it_ranks_layers_as_measuring_each_does(
    source: str,
    options: dict[str, Any],
    bits: tuple[int, int],
    recorded: Callable[[str], Any],
    quantized: Callable[..., QuantizationResult],
    output_error: Callable[..., float],
) -> None:
    """Each is a mean of PRODUCTS squares of nearly normal numbers, three calls and each image among them.

    Where one image of one call has all of the error, a twelfth of the squares count: a relative standard deviation of
    sqrt(2 * 12 / PRODUCTS) = 0.5, of a distribution (chi squared of 8) that is beyond a factor of 6 in one of a thousand
    cases. What is of second order comes on top.
    """
    own, found = recorded(source), quantized(source, weights=bits[0], activations=bits[1], **options)
    layers = linear_layers(own, found)
    exact = one_at_a_time(own, layers, output_error)
    estimated = {name: found.sensitivity[name] for name in layers}
    assert all(abs(log(estimated[name] / exact[name])) < log(6) for name in layers)
    # All together they are less uncertain.
    assert abs(log(sum(estimated.values()) / sum(exact.values()))) < log(1.5)
    pair = torch.stack([ranks(list(estimated.values())), ranks(list(exact.values()))])
    assert torch.corrcoef(pair)[0, 1] > 0.9


@pytest.mark.parametrize("integer_values", [False, True])
def test_attention_is_measured_likewise(
    integer_values: bool, recorded: Callable[[str], Any], output_error: Callable[..., float]
) -> None:
    own = recorded("tiny_text")
    names = [name for name, module in own.denoiser.named_modules() if computes_attention(module)]
    way = Int8Attention(integer_values)
    estimated = measure_attention(own.denoiser, {name: [way] for name in names}, own.trajectories, 0)
    exact = {}
    for name in names:
        with overlaid(own.denoiser, overriding_attention({name: way})):
            exact[name] = output_error(own.denoiser, own.trajectories)
    assert all(abs(log(estimated[name][0] / exact[name])) < log(6) for name in names)


def test_ways_to_round_a_layer_are_told_apart(
    recorded: Callable[[str], Any], quantized: Callable[..., QuantizationResult]
) -> None:
    own, name = recorded("tiny_class"), "transformer_blocks.0.ff.net.2"
    ways = [quantized("tiny_class", weights=bits).layers[name] for bits in (2, 4, 8)]
    errors = measure_layers(own.denoiser, {name: ways}, own.trajectories, 0)[name]
    alone = [measure_layers(own.denoiser, {name: [way]}, own.trajectories, 0)[name][0] for way in ways]
    assert errors == alone
    assert errors[0] > errors[1] > errors[2] > 0


def test_checkpointing_changes_nothing_and_nothing_stays_behind(
    recorded: Callable[[str], Any], quantized: Callable[..., QuantizationResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, found = recorded("tiny_class"), quantized("tiny_class", weights=4, activations=4)
    layers = {name: [layer] for name, layer in linear_layers(own, found).items()}
    monkeypatch.setattr(overlay, "LARGE", 0)
    checkpoints: list[bool] = []
    watched = sensitivity.answer

    def answer(denoiser: nn.Module, *arguments: Any) -> Tensor:
        checkpoints.append(own.denoiser.is_gradient_checkpointing)
        return watched(denoiser, *arguments)

    monkeypatch.setattr(sensitivity, "answer", answer)
    before = [(parameter.requires_grad, parameter.grad) for parameter in own.denoiser.parameters()]
    again = measure_layers(own.denoiser, layers, own.trajectories, 0)
    assert checkpoints == [True] * 3
    assert {name: errors[0] for name, errors in again.items()} == {name: found.sensitivity[name] for name in again}
    assert not own.denoiser.is_gradient_checkpointing
    for parameter, (required, gradient) in zip(own.denoiser.parameters(), before, strict=True):
        # Of others that were at this model before there may be some.
        assert parameter.requires_grad == required
        assert parameter.grad is gradient
    assert not any("forward" in vars(module) for module in own.denoiser.modules())


class Twice(nn.Module):
    """Calls one layer two times, and adds to what it answers in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        x = self.layer(sample)
        x += sample
        return (self.layer(x),)


def test_with_many_directions_it_is_the_error_also_of_a_layer_that_is_called_twice(
    recorded: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the first order: five standard deviations where one of the six images has all of the error."""
    torch.manual_seed(0)
    model, runs = Twice(), recorded("tiny_pixels").trajectories
    with torch.no_grad():
        calls = [
            Call(call.inputs, model(call.inputs["sample"].float(), None)[0], call.step)
            for call in evaluation_calls(runs)
        ]
    monkeypatch.setattr(sensitivity, "evaluation_calls", lambda _: calls)
    monkeypatch.setattr(sensitivity, "PRODUCTS", 6000)
    codes = (model.layer.weight.detach() / 0.01).round().to(torch.int8)
    layer = QuantizedLayer(Format(8, None, 8), codes, torch.full((8, 1), 0.01))
    ((found,),) = measure_layers(model, {"layer": [layer]}, runs, 0).values()
    exact = 0.0
    for call in calls:
        with fake_quantized(model, {"layer": layer}, StepClock(runs.timesteps)), torch.no_grad():
            moved = model(call.inputs["sample"].float(), None)[0] - call.output
        exact += float(moved.square().sum() / call.output.square().sum()) / 3
    assert found == pytest.approx(exact, rel=5 * sqrt(2 * 6 / 6000))


def test_what_is_not_called_has_no_error(recorded: Callable[[str], Any]) -> None:
    runs = recorded("tiny_pixels").trajectories
    model = Twice()
    model.unused = nn.Linear(8, 8)
    layer = QuantizedLayer(Format(8, None, 8), torch.zeros(8, 8, dtype=torch.int8), torch.ones(8, 1))
    assert measure_layers(model, {"unused": [layer]}, runs, 0) == {"unused": [0.0]}
    assert measure_layers(model, {}, runs, 0) == {}


def test_calls_are_the_first_the_middle_and_the_last(recorded: Callable[[str], Any]) -> None:
    runs = recorded("tiny_class").trajectories
    expected = list(runs.calls(runs.shards[:1]))
    assert [call.step for call in evaluation_calls(runs)] == [0, 1, 2] == [call.step for call in expected]
    assert PRODUCTS % (3 * len(expected[0].output)) == 0


class Silent(nn.Module):
    """Answers zeros, as a ControlNet does that has not learned."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        nn.init.zeros_(self.last.weight)

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return (self.last(self.layer(sample)),)


def test_what_answers_zeros_is_moved_by_nothing(
    recorded: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, runs = Silent(), recorded("tiny_pixels").trajectories
    calls = [Call(call.inputs, torch.zeros_like(call.output), call.step) for call in evaluation_calls(runs)]
    monkeypatch.setattr(sensitivity, "evaluation_calls", lambda _: calls)
    layer = QuantizedLayer(Format(8, None, 8), torch.ones(8, 8, dtype=torch.int8), torch.ones(8, 1))
    assert measure_layers(model, {"layer": [layer]}, runs, 0) == {"layer": [0.0]}
