"""An expanded layer: what it computes, and that nothing else of it changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpress.export.edits import Pack
from diffpress.export.runtime import PackedLayer, StepClock, pack_layer
from diffpress.kernels import code_range, pack_codes

FORMATS = {
    "W8A8": {"weight_bits": 8, "activation_bits": 8, "asymmetric": True, "smoothed": True},
    "W4A8": {"weight_bits": 4, "activation_bits": 8, "smoothed": True},
    "W4": {"weight_bits": 4, "activation_bits": None, "group_size": 3},
    "FP8": {"weight_bits": 8, "activation_bits": 8, "float8": True},
}


def layers() -> dict[str, nn.Module]:
    return {"linear": nn.Linear(12, 5), "conv2d": nn.Conv2d(3, 5, 2, padding=1, stride=2, bias=False)}


def inputs(kind: str) -> Tensor:
    shape = (7, 12) if kind == "linear" else (2, 3, 9, 8)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) - 0.4


@pytest.fixture(params=list(layers()))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make(kind: str):
    """A function: a packed layer of that format, with weights drawn."""

    def make(format: str) -> PackedLayer:
        generator = torch.Generator().manual_seed(0)
        edit = Pack.model_validate({"component": "unet", "module": "a", **FORMATS[format]})
        layer = pack_layer(layers()[kind], edit, StepClock([1.0]) if edit.per_step() else None)
        low, high = code_range(edit.weight_bits)
        codes = torch.randint(low, high + 1, (len(layer.weight), layer.columns), generator=generator)
        layer.weight = (
            codes.to(layer.weight.dtype) if edit.float8 else pack_codes(codes.to(torch.int8), edit.weight_bits)
        )
        layer.weight_scale = (0.5 + torch.rand(layer.weight_scale.shape, generator=generator)) / high
        if layer.activation_scale is not None:
            layer.activation_scale = torch.full((1,), 1 / 127)
        if layer.smoothing is not None:
            layer.smoothing = 0.5 + torch.rand(layer.smoothing.shape, generator=generator)
        if layer.bias is not None:
            layer.bias.data = torch.rand(layer.bias.shape, generator=generator)
        return layer

    return make


@pytest.mark.parametrize("format", FORMATS)
def test_it_answers_what_the_packed_one_does_but_for_the_rounding_of_inputs(make, kind, format: str) -> None:
    """Half a step of every input at most, times the weight that reads it; float8 rounds to one part in 16 at most."""
    layer, x = make(format), inputs(kind)
    packed = layer(x)
    layer.expand_(torch.float32)
    expanded = layer(x)
    assert layer.floats is not None
    steps = {"W4": torch.zeros_like(x), "FP8": x.abs() / 16}.get(format, torch.full_like(x, 0.5 / 127))
    if layer.smoothing is not None:
        # The codes are of the smoothed input.
        steps = steps / (layer.smoothing if kind == "linear" else layer.smoothing[:, None, None])
    weight = layer.floats.abs()
    bound = F.linear(steps, weight) if kind == "linear" else F.conv2d(steps, weight, None, 2, 1)
    # Sums of float32 of at most 12 products.
    assert ((expanded - packed).abs() <= bound + 12 * 2**-23 * (1 + packed.abs())).all()
    assert format == "W4" or not torch.equal(expanded, packed)


def test_weights_only_give_the_bits_of_the_reference(make, kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFPRESS_KERNELS", "reference")
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = make("W4"), inputs(kind).to(dtype)
        packed = layer(x)
        layer.expand_(dtype)
        assert torch.equal(layer(x), packed)


def test_what_is_stored_stays(make, kind) -> None:
    layer = make("W4A8")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.expand_(torch.float32)
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_copies_answer_alike(make, kind) -> None:
    layer, x = make("W8A8"), inputs(kind)
    layer.expand_(torch.float32)
    for own in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(own(x), layer(x))


def test_moved_it_is_packed_again(make, kind) -> None:
    layer = make("W8A8")
    layer.expand_(torch.float32)
    assert layer.to("cpu").floats is not None
    assert layer.to("meta").floats is None


def test_cast_it_is_expanded_in_that_dtype(make, kind) -> None:
    layer, other = make("W8A8"), make("W8A8")
    layer.expand_(torch.float32)
    other.to(torch.bfloat16).expand_(torch.bfloat16)
    assert torch.equal(layer.to(torch.bfloat16).floats, other.floats)
    assert layer.weight_scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_answers_in_the_dtype_of_its_input(make, kind, dtype: torch.dtype) -> None:
    layer = make("W8A8")
    layer.expand_(torch.float32)
    assert layer(inputs(kind).to(dtype)).dtype == dtype
