"""Packed layers: what they hold, what they refuse, and that edits find their places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpress.export.apply import apply_edits_
from diffpress.export.edits import Pack
from diffpress.export.errors import ArtifactError
from diffpress.export.runtime import PackedConv2d, PackedLayer, PackedLinear, StepClock, pack_layer, why_not_packable
from diffpress.kernels import code_range, pack_codes

STEPS = [900.0, 100.0]


def pack(module: str, weight_bits: int = 8) -> Pack:
    return Pack(component="unet", module=module, weight_bits=weight_bits, activation_bits=8)


class Model(nn.Module):
    """One of each kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(5, 3), nn.Conv2d(3, 4, 3, bias=False)])
        self.norm = nn.LayerNorm(3)

    def forward(self, x: torch.Tensor, timestep: float) -> torch.Tensor:
        return self.blocks[0](x)


def form(layer: nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (value.dtype, tuple(value.shape)) for name, value in layer.state_dict().items()}


def test_shapes_of_what_is_stored() -> None:
    linear = pack_layer(nn.Linear(5, 3), pack("a", 4), StepClock(STEPS))
    assert form(linear) == {
        "weight": (torch.uint8, (3, 3)),
        "weight_scale": (torch.float32, (3,)),
        "activation_scale": (torch.float32, (2,)),
        "bias": (torch.float32, (3,)),
    }
    convolution = pack_layer(nn.Conv2d(3, 4, (3, 2), bias=False), pack("a"), StepClock(STEPS))
    assert form(convolution) == {
        "weight": (torch.int8, (4, 18)),
        "weight_scale": (torch.float32, (4,)),
        "activation_scale": (torch.float32, (2,)),
    }


def test_shapes_of_what_other_formats_store() -> None:
    edit = Pack(component="unet", module="a", weight_bits=3, activation_bits=6, asymmetric=True, smoothed=True)
    convolution = pack_layer(nn.Conv2d(3, 4, (3, 2)), edit, StepClock(STEPS))
    assert form(convolution) == {
        "weight": (torch.uint8, (4, 7)),
        "weight_scale": (torch.float32, (4,)),
        "activation_scale": (torch.float32, (2,)),
        "zero_point": (torch.float32, (2,)),
        "smoothing": (torch.float32, (3,)),
        "bias": (torch.float32, (4,)),
    }
    edit = Pack(component="unet", module="a", weight_bits=8, activation_bits=8, float8=True)
    linear = pack_layer(nn.Linear(5, 3, bias=False), edit, StepClock(STEPS))
    assert form(linear) == {
        "weight": (torch.float8_e4m3fn, (3, 5)),
        "weight_scale": (torch.float32, (3,)),
        "activation_scale": (torch.float32, (2,)),
    }
    edit = Pack(component="unet", module="a", weight_bits=2, activation_bits=None, group_size=4)
    embedding = pack_layer(nn.Embedding(7, 10), edit, None)
    assert form(embedding) == {"weight": (torch.uint8, (7, 3)), "weight_scale": (torch.float32, (7, 3))}


FORMATS: dict[str, dict[str, Any]] = {
    "W8A8": {"weight_bits": 8, "activation_bits": 8},
    "W4A8 asymmetric": {"weight_bits": 4, "activation_bits": 8, "asymmetric": True},
    "W4A4 all": {"weight_bits": 4, "activation_bits": 4, "asymmetric": True, "smoothed": True},
    "W3A6 smoothed": {"weight_bits": 3, "activation_bits": 6, "smoothed": True},
    "W4 g8": {"weight_bits": 4, "activation_bits": None, "group_size": 8},
    "W2 g100 smoothed": {"weight_bits": 2, "activation_bits": None, "group_size": 100, "smoothed": True},
    "FP8": {"weight_bits": 8, "activation_bits": 8, "float8": True, "smoothed": True},
}
LAYERS = {
    "linear": (nn.Linear(63, 10), (4, 63)),
    "linear without bias": (nn.Linear(5, 3, bias=False), (2, 7, 5)),
    "convolution": (nn.Conv2d(5, 6, (3, 2), (2, 1), (1, 2), (1, 2)), (2, 5, 9, 8)),
}


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_layers_compute_what_their_format_says(
    layer: nn.Linear | nn.Conv2d, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    """Against float64, halfway between two steps. A sum of K products is rounded K times, scales and bias add five."""
    clock, generator = StepClock(STEPS), torch.Generator().manual_seed(0)
    packed = pack_layer(layer, Pack(component="unet", module="a", **options), clock)
    values = fill_(packed, generator)
    clock.set(500)
    x = torch.randn(shape, generator=generator)
    expected, largest = (simulated(layer, packed, values, x, change) for change in (lambda t: t, torch.abs))
    roundings = (packed.columns + 5) * torch.finfo(torch.float32).eps / 2
    output = packed(x)
    assert output.dtype == torch.float32
    assert output.shape == layer(x).shape
    assert torch.all((output.double() - expected).abs() <= roundings * largest)


def fill_(packed: PackedLayer, generator: torch.Generator) -> Tensor:
    """Give a packed layer random tensors; returns its weight in float64."""
    edit, shape = packed.edit, (len(packed.weight), packed.columns)
    packed.weight_scale.uniform_(0.01, 0.02, generator=generator)
    scale = packed.weight_scale.double().view(shape[0], -1)
    columns = torch.arange(shape[1]) // (edit.group_size or shape[1])
    if edit.float8:
        codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
        packed.weight.copy_(codes)
    else:
        low, high = code_range(edit.weight_bits)
        codes = torch.randint(low, high + 1, shape, dtype=torch.int8, generator=generator)
        packed.weight.copy_(pack_codes(codes, edit.weight_bits))
    if edit.activation_bits is not None:
        packed.activation_scale.copy_(torch.tensor([4.0, 2.0]) / (448 if edit.float8 else 2**edit.activation_bits))
    if edit.asymmetric:
        packed.zero_point.copy_(torch.tensor([-3.7, 5.2]))
    if edit.smoothed:
        packed.smoothing.uniform_(0.5, 2, generator=generator)
    if packed.bias is not None:
        packed.bias.normal_(generator=generator)
    return codes.double() * scale[:, columns]


def simulated(
    layer: nn.Linear | nn.Conv2d, packed: PackedLayer, weight: Tensor, x: Tensor, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """The layer in float64, halfway between two steps, with `change` applied to every factor."""
    edit, channels = packed.edit, (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
    if packed.smoothing is not None:
        x = x * packed.smoothing.view(channels)
    if edit.activation_bits is not None:
        scale = packed.activation_scale.mean()
        zero = 1 if edit.asymmetric else 0
        low, high = (code - zero for code in code_range(edit.activation_bits))
        codes = (
            (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            if edit.float8
            else (x / scale).round().clamp(low, high)
        )
        x = codes.double() * scale
    x, weight = change(x.double()), change(weight.view(layer.weight.shape))
    bias = None if packed.bias is None else change(packed.bias.double())
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embeddings_look_up_their_rows(bits: int, dtype: torch.dtype) -> None:
    layer = nn.Embedding(11, 63, dtype=dtype, padding_idx=0)
    edit = Pack(component="text_encoder", module="a", weight_bits=bits, activation_bits=None, group_size=16)
    packed = pack_layer(layer, edit, None)
    values = fill_(packed, torch.Generator().manual_seed(0))
    indices = torch.tensor([[3, 0, 10], [3, 3, 1]])
    rows = packed(indices)
    assert rows.dtype == dtype
    # A product of an integer of 8 bits and a float32, rounded once.
    assert torch.equal(rows, values.float().to(dtype)[indices])
    assert packed(indices[0, 0]).shape == (63,)
    assert packed(indices[:0]).shape == (0, 3, 63)


@pytest.mark.parametrize("options", [FORMATS["W8A8"], FORMATS["FP8"], FORMATS["W2 g100 smoothed"]], ids=str)
def test_embeddings_are_weight_only(options: dict[str, Any]) -> None:
    edit = Pack(component="text_encoder", module="a.b", **options)
    with pytest.raises(ValueError, match=rf"a\.b cannot be packed: an embedding has no input that {edit.words()}"):
        pack_layer(nn.Embedding(5, 4), edit, StepClock(STEPS))


def test_only_weight_only_does_without_a_clock() -> None:
    linear = pack_layer(nn.Linear(9, 4), Pack(component="unet", module="a", **FORMATS["W4 g8"]), None)
    assert linear(torch.ones(2, 9)).shape == (2, 4)
    with pytest.raises(ValueError, match="W8A8 has a scale for every step, and no clock"):
        pack_layer(nn.Linear(9, 4), pack("a"), None)


def test_half_precision_inputs_stay_in_it() -> None:
    for options in FORMATS.values():
        packed = pack_layer(nn.Linear(9, 4), Pack(component="unet", module="a", **options), StepClock(STEPS))
        assert packed(torch.ones(2, 9, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "2 groups"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "circular"),
        (nn.Conv2d(4, 4, 3, padding="same"), "'same'"),
        (nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
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
        apply_edits_(Model(), [pack("blocks.0")], [])
