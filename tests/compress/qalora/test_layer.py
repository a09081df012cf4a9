"""One layer under training (invariants A1 to A3 of the method)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpress.compress.qalora.layer import QaloraLayer
from diffpress.compress.qalora.student import BatchClock
from diffpress.compress.quantized_layer import QuantizedLayer, broadcast_scale, call_with, fake_quantized, smoothed
from diffpress.compress.rounding import to_half
from diffpress.export.runtime import StepClock
from diffpress.kernels import code_range, quantize

TIMESTEPS = [8.0, 4.0, 0.0]
HALF_UNIT = torch.finfo(torch.float32).eps / 2


def learner(
    case: Any, rank: int = 3, lora_scale: float = 0.125, per_step: bool = True, start: Any = None
) -> QaloraLayer:
    generator = torch.Generator().manual_seed(0)
    return QaloraLayer(case.toy.layer, start or case.start, rank, lora_scale, per_step, generator)


def smoothed_weight(case: Any) -> Tensor:
    weight = case.toy.layer.weight.detach()
    smoothing = case.start.smoothing
    return weight if smoothing is None else weight / smoothing.view(1, -1, *[1] * (weight.ndim - 2))


def disturb_(layer: QaloraLayer) -> QaloraLayer:
    """Move everything that is learned, as some training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            size = {"a": 0.1, "b": 1.0, "zero_point": 0.7, "bias": 0.1}.get(name, 0.05)
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return layer


def student(case: Any, layer: QaloraLayer, x: Tensor, timestep: Tensor | float) -> Tensor:
    clock = BatchClock(TIMESTEPS)
    clock.set(timestep)
    with torch.no_grad():
        return layer(case.toy.layer, x, clock)


def overlay(case: Any, own: QuantizedLayer, x: Tensor, timestep: float) -> Tensor:
    with fake_quantized(case.toy, {"layer": own}, StepClock(TIMESTEPS)), torch.no_grad():
        return case.toy(x, timestep)


def test_untrained_it_computes_what_it_starts_at(case: Any) -> None:
    """A1: bit for bit, at every step, where the scales survive being kept as logarithms."""
    layer = learner(case)
    assert torch.equal(layer.b, torch.zeros_like(layer.b))
    for timestep in TIMESTEPS:
        assert torch.equal(student(case, layer, case.x, timestep), overlay(case, case.start, case.x, timestep))


def test_untrained_it_finishes_as_it_started(case: Any) -> None:
    finished = learner(case).finish(case.toy.layer)
    start = case.start
    assert finished.format == start.format
    assert torch.equal(finished.weight_scale, start.weight_scale)
    for ours, theirs in (
        (finished.activation_scale, start.activation_scale),
        (finished.zero_point, start.zero_point),
        (finished.smoothing, start.smoothing),
        (finished.bias, getattr(case.toy.layer, "bias", None)),
    ):
        assert (ours is None) == (theirs is None)
        assert ours is None or theirs is None or torch.equal(ours, theirs)
    # The start's codes are of the scales before they were settled: a code may differ by one where it was nearly a tie.
    assert (finished.codes.int() - start.codes.int()).abs().max() <= 1
    again = learner(case, start=finished).finish(case.toy.layer)
    assert torch.equal(again.codes, finished.codes)


@pytest.mark.parametrize("low", [1e-8, 1e-6, 1e-3, 0.9, 30.0, 1e5])
def test_scales_move_by_rounding_only(low: float, named_case: Any) -> None:
    """log rounds to |log s| (1 + 2u), which exp turns into a relative error; exp itself adds 2u (both within an ulp).

    A weight's scale that float16 holds is rounded to it again.
    """
    case = named_case("linear", "W8A8")
    scale = to_half(torch.linspace(low, 3 * low, 7))
    codes = quantize(case.toy.layer.weight.detach(), -scale[:, None], 8)
    finished = learner(case, start=QuantizedLayer(case.start.format, codes, -scale, scale[:3])).finish(case.toy.layer)
    relative = 2 * HALF_UNIT * (1 + scale.log().abs()) * (1 + 1e-3)
    weight_relative = relative * (scale.half().float() != scale)
    assert ((finished.weight_scale + scale).abs() <= weight_relative * scale).all()
    assert finished.activation_scale is not None
    assert ((finished.activation_scale - scale[:3]).abs() <= relative[:3] * scale[:3]).all()
    # A code moves only where the weight lies as near to the middle of two codes as the scale moved.
    ratio = (case.toy.layer.weight.detach() / -scale[:, None]).clamp(*code_range(8))
    moved = finished.codes != ratio.round()
    tie = (ratio - ratio.floor() - 0.5).abs()
    assert (tie[moved] <= (ratio.abs() * relative[:, None] + 2 * HALF_UNIT * ratio.abs())[moved]).all()


def test_codes_beside_the_nearest_are_where_it_starts(case: Any) -> None:
    """Weights keep their place between two codes; what learning starts from is still what was found, and learns alike."""
    settled = learner(case).finish(case.toy.layer)
    first, last = code_range(settled.format.weight_bits)
    weight = smoothed_weight(case)
    nearest = (weight / broadcast_scale(settled.weight_scale, weight.shape, settled.format.group_size)).round()
    by = torch.randint(-1, 2, weight.shape, generator=torch.Generator().manual_seed(2))
    shifted = replace(settled, codes=(nearest + by).clamp(first, last).to(torch.int8))
    layer = learner(case, start=shifted)
    assert torch.equal(layer.finish(case.toy.layer).codes, shifted.codes)
    for timestep in TIMESTEPS:
        assert torch.equal(student(case, layer, case.x, timestep), overlay(case, shifted, case.x, timestep))
    trained = disturb_(layer)
    assert torch.equal(
        student(case, trained, case.x, TIMESTEPS[0]),
        overlay(case, trained.finish(case.toy.layer), case.x, TIMESTEPS[0]),
    )


def test_trained_it_is_what_it_finishes_as(case: Any) -> None:
    """A1, its other half: bit for bit at every step it was trained on."""
    layer = disturb_(learner(case))
    finished = layer.finish(case.toy.layer)
    assert not torch.equal(finished.codes, case.start.codes)
    for timestep in TIMESTEPS:
        assert torch.equal(student(case, layer, case.x, timestep), overlay(case, finished, case.x, timestep))


def test_what_is_finished_fits_its_format(case: Any) -> None:
    finished = disturb_(learner(case)).finish(case.toy.layer)
    low, high = code_range(finished.format.weight_bits)
    assert finished.codes.dtype == torch.int8
    assert low <= int(finished.codes.min())
    assert int(finished.codes.max()) <= high
    if finished.zero_point is not None:
        assert finished.format.activation_bits is not None
        assert torch.equal(finished.zero_point, finished.zero_point.round())
        low, high = code_range(finished.format.activation_bits)
        assert ((finished.zero_point >= low) & (finished.zero_point <= high)).all()
    assert not any(value.requires_grad for value in vars(finished).values() if isinstance(value, Tensor))


def test_zero_points_that_run_away_stay_codes(named_case: Any) -> None:
    case = named_case("linear", "W4A4 asymmetric")
    layer = learner(case)
    with torch.no_grad():
        assert layer.zero_point is not None
        layer.zero_point.copy_(torch.tensor([-100.0, 100.0, 2.4]))
    assert layer.finish(case.toy.layer).zero_point.tolist() == [-8, 7, 2]  # type: ignore[union-attr]
    for timestep in TIMESTEPS:
        finished = layer.finish(case.toy.layer)
        assert torch.equal(student(case, layer, case.x, timestep), overlay(case, finished, case.x, timestep))


@pytest.mark.parametrize("layer_name", ["linear", "convolution", "1x1 convolution"])
def test_the_merged_change_is_that_of_two_layers_after_each_other(layer_name: str, named_case: Any) -> None:
    """A2: conv(x; W + BA) = conv(x; W) + conv1x1(conv(x; A); B)."""
    case = named_case(layer_name, "W4A4")
    layer, module, x = disturb_(learner(case)), case.toy.layer, case.x
    a = layer.a.detach().view(-1, *module.weight.shape[1:])
    b = (layer.b * layer.lora_scale).detach().view(*layer.b.shape, *[1] * (module.weight.ndim - 2))
    with torch.no_grad():
        merged = call_with(module, module.forward, x, layer.merged(module), module.bias)
        inner = call_with(module, module.forward, x, a, None)
        change = F.conv2d(inner, b) if isinstance(module, nn.Conv2d) else F.linear(inner, b)
        apart = module(x) + change
        magnitude = call_with(module, module.forward, x.abs(), module.weight.abs(), module.bias.abs())
        inner = call_with(module, module.forward, x.abs(), a.abs(), None)
        magnitude += F.conv2d(inner, b.abs()) if isinstance(module, nn.Conv2d) else F.linear(inner, b.abs())
    # Sums of K products, of r products of such sums, and the merging's own r.
    roundings = 2 * (a[0].numel() + len(a) + 4)
    assert ((merged - apart).abs() <= roundings * HALF_UNIT * magnitude).all()
    # Which here is the 1e-5 that the method is held to.
    assert (merged - apart).norm() <= 1e-5 * apart.norm()


@pytest.mark.parametrize("form", ["W4A4", "W4A4 asymmetric", "W2A8 smoothed"])
def test_equal_entries_are_one_static_quantizer(form: str, named_case: Any) -> None:
    """A3: at steps of the table, between them and outside."""
    case = named_case("convolution", form)
    start = case.start
    zero = None if start.zero_point is None else start.zero_point[:1].expand(3)
    same = QuantizedLayer(
        start.format, start.codes, start.weight_scale, start.activation_scale[:1].expand(3), zero, start.smoothing
    )
    layer = learner(case, start=same)
    static = learner(case, start=start, per_step=False)
    outputs = [student(case, layer, case.x, timestep) for timestep in (8.0, 7.0, 5.0, 4.0, 1.0, 0.0, 99.0, -3.0)]
    outputs += [student(case, static, case.x, timestep) for timestep in (8.0, 5.0, 0.0)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_without_steps_of_its_own_a_layer_learns_one_scale(named_case: Any) -> None:
    case = named_case("linear", "W4A4 asymmetric")
    layer = disturb_(learner(case, per_step=False))
    assert layer.log_activation_scale is not None
    assert layer.zero_point is not None
    assert layer.log_activation_scale.shape == layer.zero_point.shape == (1,)
    finished = layer.finish(case.toy.layer)
    for table in (finished.activation_scale, finished.zero_point):
        assert table is not None
        assert table.shape == (3,)
        assert len(table.unique()) == 1


@pytest.mark.parametrize("timestep", [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 0.0, 20.0, -1.0])
def test_between_steps_the_scale_is_interpolated(timestep: float, named_case: Any) -> None:
    case = named_case("linear", "W4A4 asymmetric")
    layer = disturb_(learner(case))
    scales, zeros = (table.detach() for table in layer.activation_tables() if table is not None)
    place = min(max((8.0 - timestep) / 4, 0), 2)
    left = min(int(place), 1)
    share = place - left

    def between(table: Tensor) -> Tensor:
        return table[left : left + 1] * (1 - share) + table[left + 1 : left + 2] * share

    expected = QuantizedLayer(
        layer.format,
        layer.finish(case.toy.layer).codes,
        layer.weight_scale().detach(),
        between(scales).expand(3).contiguous(),
        between(zeros).round().expand(3).contiguous(),
        None,
        None if layer.bias is None else layer.bias.detach(),
    )
    assert torch.equal(student(case, layer, case.x, timestep), overlay(case, expected, case.x, 8.0))


def bound(case: Any, layer: QaloraLayer, x: Tensor) -> Tensor:
    """How far two orders of summation may be apart: a rounding a term, of what is summed in magnitude."""
    own = layer.finish(case.toy.layer)
    weight, bias = own.weight().abs(), None if own.bias is None else own.bias.abs()
    # Rounding moves an input by half a step or to a limit, which lies within its own magnitude and a step.
    step = 0.0 if own.activation_scale is None else float(own.activation_scale.max())
    magnitude = call_with(
        case.toy.layer, case.toy.layer.forward, smoothed(case.toy.layer, x, own.smoothing).abs() + step, weight, bias
    )
    return 2 * (weight[0].numel() + 2) * HALF_UNIT * magnitude


def test_batches_that_mix_steps_equal_calls_for_each(case: Any) -> None:
    layer = disturb_(learner(case))
    times = torch.tensor([8.0, 0.0, 4.0, 5.0, 4.0, 8.0])
    together = student(case, layer, case.x, times)
    for index, timestep in enumerate(times):
        alone = student(case, layer, case.x[index : index + 1], timestep)
        assert ((together[index] - alone[0]).abs() <= bound(case, layer, case.x[index : index + 1])[0]).all()


def test_what_a_model_folds_into_its_batch_follows_its_picture(named_case: Any) -> None:
    """Two images of three frames each: the frames of one lie beside each other."""
    case = named_case("linear", "W4A4 asymmetric")
    layer = disturb_(learner(case))
    folded = student(case, layer, case.x, torch.tensor([8.0, 0.0]))
    spelled = student(case, layer, case.x, torch.tensor([8.0, 8.0, 8.0, 0.0, 0.0, 0.0]))
    assert torch.equal(folded, spelled)


def test_every_parameter_is_learned_but_the_layers_own(case: Any) -> None:
    layer = disturb_(learner(case))
    clock = BatchClock(TIMESTEPS)
    clock.set(torch.tensor(TIMESTEPS + TIMESTEPS))
    case.toy.requires_grad_(False)
    layer(case.toy.layer, case.x, clock).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name
    assert all(parameter.grad is None for parameter in case.toy.parameters())


def test_gradients_of_the_change_are_those_of_the_weight(named_case: Any) -> None:
    """dL/dB = (dL/dW) Aᵀ s and dL/dA = s Bᵀ (dL/dW), dL/dW being that of the rounded weight where nothing clips."""
    case = named_case("convolution", "W8A8")
    layer, module = disturb_(learner(case, lora_scale=1e-3)), case.toy.layer
    with torch.no_grad():
        # Nothing is clipped.
        layer.log_weight_scale += 0.5
    clock = BatchClock(TIMESTEPS)
    clock.set(4.0)
    layer(module, case.x, clock).square().sum().backward()
    finished = layer.finish(module)
    weight = finished.weight().requires_grad_()
    fixed = StepClock(TIMESTEPS)
    fixed.set(4.0)
    call_with(module, module.forward, finished.rounded(case.x, fixed), weight, finished.bias).square().sum().backward()
    assert weight.grad is not None
    gradient = weight.grad.flatten(1).double()
    a, b, unit = layer.a.detach().double(), layer.b.detach().double(), float(layer.lora_scale)
    terms = gradient.shape[1] + len(a)
    for found, left, right in ((layer.b.grad, gradient, a.t()), (layer.a.grad, b.t(), gradient)):
        expected, size = unit * left @ right, unit * left.abs() @ right.abs()
        # Both gradients of the weight are the same numbers up to the order of their sums.
        assert found is not None
        assert ((found - expected).abs() <= 2 * (terms + case.x[:, 0].numel()) * HALF_UNIT * size.max()).all()


@pytest.mark.parametrize(("rank", "expected"), [(1, 1), (5, 5), (7, 7), (500, 7)])
def test_rank_is_at_most_that_of_the_weight(rank: int, expected: int, named_case: Callable[[str, str], Any]) -> None:
    case = named_case("linear", "W4A4")
    layer = learner(case, rank=rank)
    assert layer.a.shape == (expected, 20)
    assert layer.b.shape == (7, expected)
    moved = disturb_(layer).lora_delta()
    # What is left of a sum of products in float32, at any rank.
    rounding = 20 * torch.finfo(torch.float32).eps
    assert torch.linalg.matrix_rank(moved.detach().double(), rtol=rounding) == expected


def test_half_precision_comes_back_as_it_came(named_case: Any) -> None:
    case = named_case("linear", "W4A4")
    case.toy.to(torch.bfloat16)
    layer = learner(case)
    assert layer.bias is not None
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}
    assert student(case, layer, case.x.bfloat16(), 8.0).dtype == torch.bfloat16
