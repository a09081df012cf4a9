"""Packed layers: what they hold, what they refuse, and that edits find their places."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffpress.export.apply import apply_edits_
from diffpress.export.edits import Pack, edits_of
from diffpress.export.errors import ArtifactError
from diffpress.export.runtime import PackedConv2d, PackedLinear, StepClock, pack_layer, why_not_packable

STEPS = [900.0, 100.0]


def pack(module: str, weight_bits: int = 8, component: str = "unet") -> Pack:
    return Pack(component=component, module=module, weight_bits=weight_bits, activation_bits=8)


class Model(nn.Module):
    """One of each kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(5, 3), nn.Conv2d(3, 4, 3, bias=False)])
        self.norm = nn.LayerNorm(3)

    def forward(self, x: torch.Tensor, timestep: float) -> torch.Tensor:
        return self.blocks[0](x)


def test_shapes_of_what_is_stored() -> None:
    linear = pack_layer(nn.Linear(5, 3), pack("a", 4), StepClock(STEPS))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in linear.state_dict().items()} == {
        "weight": (torch.uint8, (3, 3)),
        "weight_scale": (torch.float32, (3,)),
        "activation_scale": (torch.float32, (2,)),
        "bias": (torch.float32, (3,)),
    }
    convolution = pack_layer(nn.Conv2d(3, 4, (3, 2), bias=False), pack("a"), StepClock(STEPS))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in convolution.state_dict().items()} == {
        "weight": (torch.int8, (4, 18)),
        "weight_scale": (torch.float32, (4,)),
        "activation_scale": (torch.float32, (2,)),
    }


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "2 groups"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "circular"),
        (nn.Conv2d(4, 4, 3, padding="same"), "'same'"),
        (nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d is neither"),
        (nn.LayerNorm(4), "LayerNorm is neither"),
    ],
)
def test_what_cannot_be_packed_says_why(layer: nn.Module, reason: str) -> None:
    assert reason in (why_not_packable(layer) or "")
    with pytest.raises(ValueError, match=f"some.layer cannot be packed: .*{reason}"):
        pack_layer(layer, pack("some.layer"), StepClock(STEPS))


def test_edits_replace_modules_and_share_one_clock() -> None:
    model = Model()
    clock = apply_edits_(model, [pack("blocks.0"), pack("blocks.1", 4)], STEPS)
    assert isinstance(model.blocks[0], PackedLinear)
    assert isinstance(model.blocks[1], PackedConv2d)
    assert model.blocks[0].clock is clock
    assert model.blocks[1].clock is clock
    model(torch.zeros(2, 5), 100.0)
    assert clock.weights.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("module", "reason"),
    [("blocks.7", "unet.blocks.7 does not apply"), ("nothing.at.all", "nothing"), ("norm", "LayerNorm"), ("", "unet.")],
)
def test_edits_that_do_not_fit_are_refused(module: str, reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason):
        apply_edits_(Model(), [pack(module)], STEPS)


def test_steps_that_do_not_fall_are_an_artifact_error() -> None:
    with pytest.raises(ArtifactError, match="timesteps must fall strictly"):
        apply_edits_(Model(), [], [])


def test_edits_of_keeps_the_order_and_only_the_component() -> None:
    edits = [pack("b"), pack("x", component="vae"), pack("a")]
    assert [edit.module for edit in edits_of("unet", edits)] == ["b", "a"]


@pytest.mark.parametrize("wrong", [{"weight_bits": 5}, {"activation_bits": 16}, {"surprise": 1}, {"kind": "drop"}])
def test_edits_hold_only_what_is_known(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Pack.model_validate({"component": "unet", "module": "a", "weight_bits": 4, "activation_bits": 8, **wrong})
