"""Rounding that can be taken off again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

from diffpress.calibration.sampling import replay
from diffpress.compress.overlay import overlaid, teacher
from diffpress.compress.quantized_layer import (
    Format,
    QuantizedLayer,
    broadcast_scale,
    call_with,
    fake_quantized,
    smoothed,
)
from diffpress.compress.result import QuantizationResult
from diffpress.export.runtime import Forward, StepClock


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that an overlay might leave behind."""
    return {
        "tensors": {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": [
            (dict(module._forward_pre_hooks), dict(module._forward_hooks), dict(module._forward_hooks_with_kwargs))
            for module in model.modules()
        ],
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    assert after["attributes"] == before["attributes"]
    assert after["hooks"] == before["hooks"]
    for name, (pointer, value) in before["tensors"].items():
        assert after["tensors"][name][0] == pointer
        assert torch.equal(after["tensors"][name][1], value)


@pytest.mark.parametrize(
    ("name", "keep"),
    [("tiny_class", []), ("tiny_pixels", ["down_blocks.*", "up_blocks.*"])],
    ids=["linear", "convolution"],
)
@pytest.mark.parametrize("failing", [False, True], ids=["as planned", "the body fails"])
def test_overlay_leaves_no_trace(
    name: str,
    keep: list[str],
    failing: bool,
    recorded: Callable[[str], Any],
    quantized: Callable[..., QuantizationResult],
) -> None:
    own, found = recorded(name), quantized(name, weights=4, activations=4, keep=keep)
    call = next(iter(own.trajectories.calls()))
    before = state(own.denoiser)
    clock = StepClock(own.trajectories.timesteps)
    rounds = {name: layer for name, layer in found.layers.items() if layer.activation_scale is not None}
    try:
        with fake_quantized(own.denoiser, rounds, clock):
            assert not torch.equal(replay(own.denoiser, call), call.output)
            if failing:
                raise RuntimeError
    except RuntimeError:
        assert failing
    assert_untouched(own.denoiser, before)
    assert torch.equal(replay(own.denoiser, call), call.output)


def test_overlay_is_removed_when_the_denoiser_fails_inside(
    recorded: Callable[[str], Any], quantized: Callable[..., QuantizationResult]
) -> None:
    own, found = recorded("tiny_class"), quantized("tiny_class", weights=4, activations=4)
    before = state(own.denoiser)
    with pytest.raises(TypeError), fake_quantized(own.denoiser, found.layers, StepClock([1.0])):
        own.denoiser(nonsense=1)
    assert_untouched(own.denoiser, before)


class Toy(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, timestep: Tensor | float) -> Tensor:
        return self.layer(x)


def test_each_step_has_its_own_scale_and_zero_point() -> None:
    """Integers times scales that are powers of two: the result is exact and can be written down."""
    layer = nn.Linear(2, 1, bias=False)
    own = QuantizedLayer(
        Format(8, 4),
        torch.tensor([[2, -3]], dtype=torch.int8),
        torch.tensor([0.5]),
        torch.tensor([1.0, 0.25]),
        torch.tensor([-8.0, 0.0]),
    )
    toy, x = Toy(layer), torch.tensor([[9.4, -1.6]])
    with fake_quantized(toy, {"layer": own}, StepClock([10.0, 0.0])):
        # Codes 0 to 15 above zero: 9 and 0. Then codes -8 to 7 of a quarter each: 1.75 and -1.5.
        assert toy(x, 10.0).tolist() == [[9.0 * 1.0]]
        assert toy(x, 0.0).tolist() == [[1.75 * 1.0 - 1.5 * -1.5]]
        # Half way: a scale of 0.625 and a zero point of -4, so codes -4 to 11: 6.875 and -1.875.
        assert toy(x, 5.0).tolist() == [[6.875 * 1.0 + -1.875 * -1.5]]


def test_smoothing_and_bias_take_part() -> None:
    layer = nn.Conv2d(2, 1, 1)
    own = QuantizedLayer(
        Format(8, 8),
        torch.tensor([4, 8], dtype=torch.int8).view(1, 2, 1, 1),
        torch.tensor([0.25]),
        torch.tensor([1.0]),
        None,
        torch.tensor([2.0, 0.5]),
        torch.tensor([0.125]),
    )
    toy = Toy(layer)
    with fake_quantized(toy, {"layer": own}, StepClock([1.0])):
        # (3 * 2) * 1 + (8 * 0.5) * 2 + 0.125
        assert toy(torch.tensor([3.0, 8.0]).view(1, 2, 1, 1), 1.0).item() == 14.125


def test_quantization_weight_undoes_its_codes() -> None:
    codes = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8)
    assert QuantizedLayer(Format(8, 8), codes, torch.tensor([0.5, -2.0])).weight().tolist() == [
        [0.5, -1.0],
        [-6.0, -8.0],
    ]


def test_spread_lays_groups_over_flattened_columns() -> None:
    scale = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    spread_scale = broadcast_scale(scale, torch.Size([2, 5, 1, 1]), 2)
    assert spread_scale.shape == (2, 5, 1, 1)
    assert spread_scale.flatten(1).tolist() == [[1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]
    assert broadcast_scale(torch.ones(2), torch.Size([2, 5, 3, 3]), None).shape == (2, 1, 1, 1)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(5, 4), torch.randn(2, 3, 5)),
        (nn.Linear(5, 4, bias=False), torch.randn(5)),
        (nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0), dilation=2), torch.randn(2, 4, 9, 8)),
        (nn.Embedding(7, 3), torch.tensor([[1, 6], [0, 0]])),
    ],
    ids=["linear", "without bias", "convolution", "embedding"],
)
def test_layers_run_as_themselves(layer: nn.Module, x: Tensor) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    assert torch.equal(call_with(layer, layer.forward, x, weight, getattr(layer, "bias", None)), layer(x))
    assert smoothed(layer, x, None) is x


def doubled(beneath: Forward) -> Forward:
    return lambda x: 2 * beneath(x)


def shifted(beneath: Forward) -> Forward:
    return lambda x: beneath(x) + 1


def test_overlays_nest_in_the_order_in_which_they_are_laid() -> None:
    toy, x = Toy(nn.Linear(3, 3)), torch.ones(1, 3)
    before, plain = state(toy), toy(x, 0)
    with overlaid(toy, {"layer": doubled}):
        with overlaid(toy, {"layer": shifted}):
            assert torch.equal(toy(x, 0), 2 * plain + 1)
            with teacher(toy):
                assert torch.equal(toy(x, 0), plain)
                with overlaid(toy, {"layer": shifted}):
                    assert torch.equal(toy(x, 0), plain + 1)
                assert torch.equal(toy(x, 0), plain)
            assert torch.equal(toy(x, 0), 2 * plain + 1)
        assert torch.equal(toy(x, 0), 2 * plain)
    assert_untouched(toy, before)


def test_a_forward_that_another_library_has_set_stays() -> None:
    """As accelerate does it: the hook's forward is an attribute of the instance."""
    toy, x, calls = Toy(nn.Linear(3, 3)), torch.ones(1, 3), []

    class Counting(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    plain = toy(x, 0)
    add_hook_to_module(toy.layer, Counting())
    own = toy.layer.forward
    with overlaid(toy, {"layer": doubled}):
        assert torch.equal(toy(x, 0), 2 * plain)
        assert len(calls) == 1
        with teacher(toy):
            assert toy.layer.forward is own
    assert toy.layer.forward is own
    toy(x, 0)
    assert len(calls) == 2


def test_fake_quantization_computes_through_what_lies_beneath() -> None:
    """A mask of an earlier stage, laid around the input, still holds: the result is that of the cut layer."""
    layer = nn.Linear(4, 2)
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    own = QuantizedLayer(
        Format(8, 8),
        torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=torch.int8),
        torch.tensor([0.5, 0.25]),
        torch.tensor([1.0]),
    )
    toy, x = Toy(layer), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    masked = {"layer": lambda beneath: lambda x: beneath(x * mask)}
    with overlaid(toy, masked), fake_quantized(toy, {"layer": own}, StepClock([1.0])):
        found = toy(x, 1.0)
    expected = torch.tensor([[(1 * 1 + 3 * 3) * 0.5, (5 * 1 + 7 * 3) * 0.25]]) + layer.bias
    assert torch.equal(found, expected)
