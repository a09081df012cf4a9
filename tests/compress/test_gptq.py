"""Weights that make up for each other's rounding errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpress.calibration import moments
from diffpress.calibration.moments import SecondMoments
from diffpress.calibration.observe import input_rows
from diffpress.compress import gptq as own_file
from diffpress.compress.gptq import LAMBDA, gptq, round_columns, smoothed_moments
from diffpress.kernels import code_range, quantize

LAYERS = [
    nn.Conv2d(3, 4, (3, 2), stride=2, padding=1),
    nn.Conv2d(3, 4, 3, padding=(0, 2), dilation=2),
    nn.Conv2d(3, 4, 1),
]


def correlated(rows: int, columns: int) -> Tensor:
    """Inputs whose columns move together, as those of a real layer do."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns // 3, columns, generator=generator)
    return torch.randn(rows, columns // 3, generator=generator) @ mixing + 0.1 * torch.randn(
        rows, columns, generator=generator
    )


def blocks_of(inputs: Tensor, width: int) -> Tensor:
    """Second moments block by block, the last block filled up with zeros."""
    padded = F.pad(inputs, (0, -inputs.shape[1] % width)).unflatten(1, (-1, width)).transpose(0, 1)
    return padded.transpose(1, 2) @ padded


def damped_loss(weight: Tensor, codes: Tensor, scale: Tensor, h: Tensor) -> Tensor:
    """What is minimized, row by row: the squared error at the output and, by the damping, that of the weights."""
    error = (codes.double() * scale - weight).double()
    damped = h.double() + LAMBDA * h.diagonal().mean() * torch.eye(len(h))
    return ((error @ damped) * error).sum(1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_loses_less_than_rounding_to_nearest(bits: int) -> None:
    inputs, weight = correlated(400, 60), torch.randn(24, 60, generator=torch.Generator().manual_seed(1))
    scale = weight.abs().amax(1, keepdim=True) / code_range(bits)[1]
    h = blocks_of(inputs, 60)
    codes = round_columns(weight, scale, h, bits)
    nearest = quantize(weight, scale, bits)
    ours, theirs = (damped_loss(weight, found, scale, h[0]) for found in (codes, nearest))
    assert ours.sum() < 0.8 * theirs.sum()
    low, high = code_range(bits)
    assert low <= int(codes.min())
    assert int(codes.max()) <= high
    assert (codes.int() - (weight / scale).round().clamp(low - 1, high + 1)).abs().max() <= 1


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    scale = torch.full((5, 1), 0.25)
    codes = round_columns(weight, scale, torch.diag(torch.arange(1.0, 9.0))[None], 4)
    assert torch.equal(codes, quantize(weight, scale, 4))


def test_the_last_column_of_two_makes_up_for_the_first() -> None:
    """By hand: both inputs are alike but for the damping, the first of the larger moment goes first."""
    h = torch.tensor([[[4.0, 3.0], [3.0, 2.5]]])
    damping = LAMBDA * 3.25
    weight = torch.tensor([[0.4, 0.4]])
    # Rounded to 0, the first leaves an error of 0.4; the second best takes 0.4 + 0.4 * 3 / (2.5 + damping) = 0.745.
    assert 0.4 + 0.4 * 3 / (2.5 + damping) > 0.5
    assert round_columns(weight, torch.ones(1, 1), h, 4).tolist() == [[0, 1]]


def test_blocks_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "BLOCK", 4)
    inputs, weight = correlated(50, 10), torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    scale = torch.full((3, 1), 0.3)
    codes = round_columns(weight, scale, blocks_of(inputs, 4), 4)
    parts = [
        round_columns(weight[:, start : start + 4], scale, blocks_of(inputs[:, start : start + 4], 4), 4)
        for start in (0, 4)
    ]
    assert torch.equal(codes[:, :8], torch.cat(parts, 1))
    assert codes.shape == weight.shape


def test_inputs_that_are_all_zero_round_to_nearest() -> None:
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    scale = torch.full((3, 1), 0.3)
    assert torch.equal(round_columns(weight, scale, torch.zeros(1, 6, 6), 4), quantize(weight, scale, 4))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_rows_are_what_a_convolution_multiplies(layer: nn.Conv2d) -> None:
    """Every drawn row is one of the windows, so that its product with the weight is one of the outputs."""
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(3))
    rows = input_rows(layer, x, 64, torch.Generator().manual_seed(4))
    assert not isinstance(layer.padding, str)
    windows = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2).flatten(0, 1)
    same = (rows[:, None] == windows[None]).all(2)
    assert rows.shape == (64, layer.weight[0].numel())
    assert same.any(1).all()
    assert same.any(0).sum() > min(len(windows), 64) // 3


def test_of_a_linear_it_draws_rows() -> None:
    x = torch.randn(2, 50, 6)
    rows = input_rows(nn.Linear(6, 3), x, 20, torch.Generator().manual_seed(0))
    assert (rows[:, None] == x.flatten(0, 1)[None]).all(2).any(1).all()
    assert input_rows(nn.Linear(6, 3), x, 200, torch.Generator().manual_seed(0)).shape == (100, 6)


@pytest.mark.parametrize("lazy", [1, 7, 1000])
def test_errors_may_reach_the_columns_behind_late(lazy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, weight = (
        correlated(400, 60).double(),
        torch.randn(24, 60, generator=torch.Generator().manual_seed(1)).double(),
    )
    scale = weight.abs().amax(1, keepdim=True) / 7
    codes = round_columns(weight, scale, blocks_of(inputs, 60), 4)
    monkeypatch.setattr(own_file, "LAZY", lazy)
    assert torch.equal(round_columns(weight, scale, blocks_of(inputs, 60), 4), codes)


@pytest.mark.parametrize("taps", [1, 9])
def test_moments_of_smoothed_inputs_are_those_of_the_inputs_smoothed(
    taps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entry by entry two products of float32 beside one, and a sum of 50 terms on either side."""
    monkeypatch.setattr(moments, "BLOCK", 16)
    generator = torch.Generator().manual_seed(0)
    rows, smoothing = torch.randn(50, 5 * taps, generator=generator), torch.rand(5, generator=generator) + 0.5
    width = moments.block_sizes(5 * taps)[1]
    expected = blocks_of(rows * smoothing.repeat_interleave(taps), width)
    magnitude = blocks_of((rows * smoothing.repeat_interleave(taps)).abs(), width)
    found = smoothed_moments(blocks_of(rows, width), smoothing, taps)
    assert ((found - expected).abs() <= (50 + 4) * torch.finfo(torch.float32).eps * magnitude).all()


def moments_of(case: Any) -> SecondMoments:
    """Of every layer that could be quantized."""
    layers = {name: layer for name, layer in case.denoiser.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    return SecondMoments(case.denoiser, layers, case.trajectories, 0)


def rounded(case: Any, layers: dict[str, Any]) -> dict[str, Any]:
    return {name: gptq(case.denoiser.get_submodule(name), layers[name], h) for name, h in moments_of(case).of(layers)}


def test_codes_change_and_scales_stay(recorded: Callable[[str], Any], quantized: Callable[..., Any]) -> None:
    case = recorded("tiny_text")
    layers = quantized("tiny_text", weights=4, activations=8, gptq=False).layers
    found = rounded(case, layers)
    assert set(found) == set(layers)
    for name, own in found.items():
        assert own.codes.shape == layers[name].codes.shape
        assert torch.equal(own.weight_scale, layers[name].weight_scale)
    assert any(not torch.equal(found[name].codes, layers[name].codes) for name in layers)


def test_moments_that_do_not_fit_together_are_collected_in_parts(
    recorded: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them over as many rows as where they fit, and on the scale of the second moments themselves."""
    case = recorded("tiny_class")
    whole = moments_of(case)
    assert len(whole.parts) == 1
    expected = dict(whole.of(whole.layers))
    monkeypatch.setattr(moments, "SMALLEST_BUDGET", 1)
    monkeypatch.setattr(moments, "ROWS", 10_000)
    each = moments_of(case)
    assert len(each.parts) > 1
    sizes = [
        sum(blocks * width**2 * 4 for blocks, width in (moments.block_sizes(columns(case, name)) for name in part))
        for part in each.parts
    ]
    limit = sum(parameter.nbytes for parameter in case.denoiser.parameters()) // 2
    assert all(size <= limit or len(part) == 1 for size, part in zip(sizes, each.parts, strict=True))
    found = dict(each.of(each.layers))
    assert found.keys() == expected.keys()
    for name, h in found.items():
        assert h.shape == expected[name].shape
        # The others saw at most 64 rows of 64 and fewer at a time: all of those that there are.
        assert h.diagonal(dim1=1, dim2=2).sum() == pytest.approx(
            float(expected[name].diagonal(dim1=1, dim2=2).sum()), rel=0.5
        )


def columns(case: Any, name: str) -> int:
    return case.denoiser.get_submodule(name).weight[0].numel()


def test_float8_has_no_codes_to_choose(recorded: Callable[[str], Any], quantized: Callable[..., Any]) -> None:
    case = recorded("tiny_text")
    layers = quantized("tiny_text", format="float8").layers
    found = rounded(case, layers)
    assert all(found[name] is own for name, own in layers.items() if own.format.float8)


def test_layers_lose_less_at_the_output(quantized: Callable[..., Any]) -> None:
    """As the whole denoiser measures it, one layer at a time, in the geometric mean."""
    nearest, ours = (quantized("tiny_text", weights=4, activations="none", gptq=choice) for choice in (False, True))
    low = [name for name, own in nearest.layers.items() if own.format.weight_bits == 4]
    assert sum(torch.tensor([ours.sensitivity[name] / nearest.sensitivity[name] for name in low]).log()) < 0
