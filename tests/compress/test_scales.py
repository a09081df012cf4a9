from __future__ import annotations

import pytest
import torch

from diffpress.compress.scales import CANDIDATES, REACH, candidate_scales, choose_step_scales, search_weight_scale
from diffpress.kernels import code_range, dequantize, quantize


def loss(weight: torch.Tensor, importance: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Weighted squared rounding error of each output channel."""
    rounded = dequantize(quantize(weight, scale[:, None, None], bits), scale[:, None, None])
    return ((rounded - weight).square().sum(2) * importance).sum(1)


@pytest.mark.parametrize("bits", [4, 8])
def test_searched_weight_scale_never_loses_to_the_largest_magnitude(bits: int):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 33, 9, generator=generator)
    importance = torch.rand(33, generator=generator) ** 4
    searched = search_weight_scale(weight, importance, bits)
    plain = weight.abs().amax((1, 2)) / code_range(bits)[1]
    assert (loss(weight, importance, searched, bits) <= loss(weight, importance, plain, bits)).all()


def test_weight_scale_follows_the_channels_that_matter():
    """One outlier in a channel that is never active must not set the step of all others."""
    weight = torch.linspace(-1, 1, 64).view(1, 64, 1).clone()
    weight[0, 0, 0] = 1.9
    importance = torch.ones(64)
    importance[0] = 0.0
    blind = search_weight_scale(weight, torch.ones(64) + 1e6 * (torch.arange(64) == 0), 4)
    seeing = search_weight_scale(weight, importance, 4)
    assert seeing < 0.75 * blind


def test_channel_of_zeros_gets_a_positive_scale_and_zero_codes():
    weight = torch.zeros(2, 5, 1)
    weight[1] = 1.0
    scale = search_weight_scale(weight, torch.ones(5), 4)
    assert (scale > 0).all()
    assert torch.isfinite(scale).all()
    assert (quantize(weight, scale[:, None, None], 4)[0] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_candidates_start_where_nothing_is_clipped_and_fall(bits: int):
    scales = candidate_scales(torch.tensor([0.5, 3.0, 1.0]), bits)
    assert len(scales) == CANDIDATES
    assert scales[0] * code_range(bits)[1] == pytest.approx(3.0)
    assert scales[0] / scales[-1] == pytest.approx(REACH, rel=1e-5)
    assert (scales[1:] < scales[:-1]).all()


def test_steps_get_their_own_scales_only_where_that_holds_on_the_other_half():
    scales = torch.tensor([4.0, 2.0, 1.0])
    early, late = torch.tensor([1.0, 5.0, 9.0]), torch.tensor([9.0, 5.0, 1.0])
    steps = torch.stack([early] * 4 + [late] * 4)
    chosen, differs = choose_step_scales(scales, torch.stack([steps, steps]))
    assert differs
    assert chosen.tolist() == [4.0] * 4 + [1.0] * 4
    misleading = torch.stack([steps, steps.flip(0)])
    chosen, differs = choose_step_scales(scales, misleading)
    assert not differs
    assert len(chosen.unique()) == 1
