"""Post-training quantization of whole denoisers and of text encoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffpress.calibration.observe import observe_inputs
from diffpress.compress.layers import KINDS, stored_bits
from diffpress.compress.options import Ptq
from diffpress.compress.ptq import quantize_denoiser, quantize_weights
from diffpress.compress.quantized_layer import Format, QuantizedLayer, broadcast_scale
from diffpress.compress.result import QuantizationResult, edits_and_tensors
from diffpress.export.apply import apply_edits_
from diffpress.export.errors import RecipeError, UnsupportedModelError
from diffpress.export.source import Form, forms_of, source_tensors
from diffpress.kernels import code_range, quantize

CONVOLUTIONS = {"keep": ["down_blocks.*", "up_blocks.*"]}
W4A4: dict[str, Any] = {"weights": 4, "activations": 4}


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("tiny_class", W4A4),
        ("tiny_class", {"weights": 4, "activations": "none"}),
        ("tiny_pixels", {**W4A4, **CONVOLUTIONS}),
        ("tiny_text", {**W4A4, **CONVOLUTIONS}),
    ],
    ids=str,
)
def test_every_layer_is_either_quantized_or_has_a_reason(
    source: str, options: dict[str, Any], recorded: Callable[[str], Any], quantized: Callable[..., QuantizationResult]
) -> None:
    own, found = recorded(source), quantized(source, **options)
    layers = {name: module for name, module in own.denoiser.named_modules() if isinstance(module, KINDS)}
    for name, module in layers.items():
        assert name in found.layers or found.reasons[name], name
        if name in found.layers:
            assert found.layers[name].codes.shape == module.weight.shape
    assert set(found.layers) <= set(layers)
    assert set(found.reasons) <= set(layers)
    measured = {name for name, layer in found.layers.items() if not isinstance(layers[name], nn.Embedding)}
    assert measured <= set(found.sensitivity) <= set(layers)
    assert found.component == own.source.denoiser


def equal(first: QuantizedLayer, second: QuantizedLayer) -> bool:
    pairs = [(getattr(first, name), getattr(second, name)) for name in vars(first) if name != "format"]
    same = all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)
    return same and first.format == second.format


def test_same_seed_finds_the_same_integers_and_the_denoiser_stays_as_it_is(
    recorded: Callable[[str], Any], quantized: Callable[..., QuantizationResult]
) -> None:
    own, first = recorded("tiny_class"), quantized("tiny_class", **W4A4)
    before = {name: value.clone() for name, value in own.denoiser.state_dict().items()}
    attributes = {name: sorted(vars(module)) for name, module in own.denoiser.named_modules()}
    second = quantize_denoiser(
        own.source.denoiser, own.denoiser, own.forms, own.trajectories, Ptq(method="ptq", **W4A4), seed=0
    )
    assert first.layers.keys() == second.layers.keys()
    assert all(equal(layer, second.layers[name]) for name, layer in first.layers.items())
    assert first.sensitivity == second.sensitivity
    assert all(torch.equal(value, before[name]) for name, value in own.denoiser.state_dict().items())
    assert attributes == {name: sorted(vars(module)) for name, module in own.denoiser.named_modules()}


@pytest.mark.parametrize(
    "chosen", [("tiny_class", {}), ("tiny_pixels", CONVOLUTIONS)], ids=["tiny_class", "tiny_pixels"]
)
def test_more_bits_lose_less(chosen: tuple[str, dict[str, Any]], quantized: Callable[..., QuantizationResult]) -> None:
    source, rest = chosen
    results = [
        quantized(source, weights=weights, activations=activations, **rest)
        for weights, activations in ((8, 8), (4, 8), (4, 4))
    ]
    as_asked = [name for name, layer in results[-1].layers.items() if layer.format == Format(4, 4)]
    assert as_asked
    errors = [sum(result.sensitivity[name] for name in as_asked) for result in results]
    assert errors[0] < errors[1] < errors[2]


def test_embeddings_are_weight_only(
    recorded: Callable[[str], Any], quantized: Callable[..., QuantizationResult]
) -> None:
    own, found = recorded("tiny_class"), quantized("tiny_class", **W4A4)
    embeddings = [name for name, module in own.denoiser.named_modules() if isinstance(module, nn.Embedding)]
    assert embeddings
    for name in embeddings:
        assert found.layers[name].format == Format(8, None, 16)
        assert found.layers[name].activation_scale is None
        assert found.reasons[name] == "embedding, 8 bits"


def bits_of(found: QuantizationResult, low: set[str]) -> tuple[float, set[str]]:
    """The average over the layers `low`, scales counted, and which of them have 8 bits because they are sensitive."""
    layers = {name: found.layers[name] for name in low}
    total = sum(stored_bits(layer) for layer in layers.values())
    sensitive = {name for name in found.layers if found.reasons.get(name, "").startswith("sensitive")}
    assert all(layers[name].format.weight_bits == 8 for name in sensitive)
    return total / sum(layer.codes.numel() for layer in layers.values()), sensitive


def test_effective_bits_go_to_the_most_sensitive_layers(quantized: Callable[..., QuantizationResult]) -> None:
    plain = quantized("tiny_class", weights=2, activations=8)
    low = {name for name, layer in plain.layers.items() if layer.format == Format(2, 8)}
    found = quantized("tiny_class", weights=2, activations=8, effective_bits=5)
    spent, sensitive = bits_of(found, low)
    # Layers that keep 8 bits anyway do not count; scales of rows of 16 and of 64 columns take two bits a weight and half one.
    assert bits_of(plain, low)[0] < spent <= 5
    assert sensitive
    assert sensitive < low

    def gain(name: str) -> float:
        """What 8 bits gained a weight, as was measured."""
        return plain.sensitivity[name] - found.sensitivity[name]

    # Whoever got more bits gained by them, and whoever loses most for its size is among them.
    assert all(gain(name) > 0 for name in sensitive)
    per_weight = {name: plain.sensitivity[name] / plain.layers[name].codes.numel() for name in low}
    assert max(per_weight, key=lambda name: per_weight[name]) in sensitive


@pytest.mark.parametrize("weights", [8, 4])
def test_inputs_stay_in_float_where_they_err_most_for_what_they_multiply(
    weights: int, recorded: Callable[[str], Any], quantized: Callable[..., QuantizationResult]
) -> None:
    own, share = recorded("tiny_class"), 0.2
    plain = quantized("tiny_class", weights=weights, activations=4)
    found = quantized("tiny_class", weights=weights, activations=4, float_activations=share)
    layers = {name: own.denoiser.get_submodule(name) for name in plain.sensitivity}
    macs = {name: entry.macs for name, entry in observe_inputs(own.denoiser, layers, own.trajectories, 0).items()}
    integers = [name for name, layer in plain.layers.items() if layer.format.activation_bits is not None]
    spared = [name for name in integers if found.layers[name].format.activation_bits is None]
    assert spared
    assert sum(macs[name] for name in spared) <= share * sum(macs.values())
    assert all(found.layers[name].format.weight_bits == weights for name in spared)
    assert all(found.sensitivity[name] < plain.sensitivity[name] for name in spared)
    assert all(found.reasons[name] == "sensitive, inputs in float" for name in spared)
    that_fit = [name for name in integers if macs[name] <= share * sum(macs.values())]
    assert max(that_fit, key=lambda name: plain.sensitivity[name] / macs[name]) in spared
    assert all(equal(found.layers[name], plain.layers[name]) for name in integers if name not in spared)


def test_no_inputs_stay_in_float_where_no_layer_is_small_enough(quantized: Callable[..., QuantizationResult]) -> None:
    plain, found = (quantized("tiny_class", **W4A4, float_activations=share) for share in (0, 1e-6))
    assert all(equal(layer, plain.layers[name]) for name, layer in found.layers.items())
    assert found.reasons == plain.reasons


def test_scales_may_take_all_that_is_left_over(quantized: Callable[..., QuantizationResult]) -> None:
    plain, found = (quantized("tiny_class", weights=2, activations=8, effective_bits=budget) for budget in (None, 2.5))
    assert all(equal(layer, plain.layers[name]) for name, layer in found.layers.items())


def test_weights_of_a_text_encoder(recorded: Callable[[str], Any]) -> None:
    own = recorded("tiny_text")
    encoder, forms = own.pipeline.text_encoder, forms_of(source_tensors(own.source, "text_encoder"))
    options = Ptq(method="ptq", weights=4, activations="none", group_size=8, components=["text_encoders"])
    found = quantize_weights("text_encoder", encoder, forms, options)
    words = [name for name in found.layers if isinstance(encoder.get_submodule(name), nn.Embedding)]
    assert any(name.endswith("token_embedding") for name in words)
    for name, layer in found.layers.items():
        assert layer.activation_scale is None
        assert layer.zero_point is None
        assert layer.smoothing is None
        assert layer.format == (Format(8, None, 16) if name in words else Format(4, None, 8))
        weight = encoder.get_submodule(name).weight.detach().float()
        scale = broadcast_scale(layer.weight_scale, weight.shape, layer.format.group_size)
        # Each code is the one nearest to its weight.
        assert torch.equal(layer.codes, quantize(weight, scale, layer.format.weight_bits))
        # The search loses less than the largest magnitude at the largest code, which it begins with.
        groups = weight.split(layer.format.group_size, 1)
        full = torch.cat([group.abs().amax(1, keepdim=True).expand_as(group) for group in groups], 1)
        step = full / code_range(layer.format.weight_bits)[1]
        assert (layer.weight() - weight).square().sum() < ((weight / step).round() * step - weight).square().sum()
    assert not found.sensitivity
    edits, tensors = edits_and_tensors(found)
    assert all(edit.component == "text_encoder" and edit.group_size for edit in edits)
    assert len(tensors) == 2 * len(edits)


class T5(nn.Module):
    """Its `wo` is asked for its dtype, as transformers' T5 does."""

    def __init__(self) -> None:
        super().__init__()
        self.ff = nn.ModuleDict({"wi": nn.Linear(32, 64, bias=False), "wo": nn.Linear(64, 32, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.ff["wo"](self.ff["wi"](x))


def test_layers_that_are_asked_for_their_dtype_get_eight_bits() -> None:
    model = T5()
    options = Ptq(method="ptq", weights=4, activations="none")
    found = quantize_weights("text_encoder_3", model, forms_of(model.state_dict()), options)
    assert found.layers["ff.wi"].format == Format(4, None, 32)
    assert found.layers["ff.wo"].format == Format(8, None, 64)
    assert found.reasons == {"ff.wo": "its model asks for 8 bits"}
    edits, tensors = edits_and_tensors(found)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    expected = x @ found.layers["ff.wi"].weight().t() @ found.layers["ff.wo"].weight().t()
    assert apply_edits_(model, edits, []) is None
    model.load_state_dict(tensors)
    half_unit = torch.finfo(torch.float32).eps / 2
    magnitude = x.abs() @ found.layers["ff.wi"].weight().abs().t() @ found.layers["ff.wo"].weight().abs().t()
    # Two sums after each other, each computed twice.
    assert ((model(x) - expected).abs() <= 2 * (32 + 64 + 4) * half_unit * magnitude).all()


class Partly(nn.Module):
    """A denoiser with a layer that nobody calls, and one that is better left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.unused, self.small = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 8), nn.Conv2d(8, 1, 1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.last(self.small(self.middle(self.entry(sample).relu()))),)


def test_layers_that_are_never_called_or_would_not_shrink_are_left_alone(recorded: Callable[[str], Any]) -> None:
    torch.manual_seed(0)
    model, runs = Partly(), recorded("tiny_pixels").trajectories
    forms = {name: Form(tuple(value.shape), torch.float16) for name, value in model.state_dict().items()}
    found = quantize_denoiser("unet", model, forms, runs, Ptq(method="ptq", weights=4, per_step=True), seed=0)
    assert found.reasons["unused"] == "never called while recording"
    # Eight bytes of weights saved, one scale and a table of three scales spent.
    assert found.reasons["small"] == "would not be smaller"
    assert found.layers.keys() == {"entry", "middle", "last"} - {
        name for name, reason in found.reasons.items() if reason == "would not be smaller"
    }


@pytest.mark.parametrize("quantize", ["denoiser", "weights"])
def test_models_that_cannot_be_quantized_are_refused(quantize: str, recorded: Callable[[str], Any]) -> None:
    def run(model: nn.Module, **options: Any) -> None:
        if quantize == "weights":
            quantize_weights("x", model, {}, Ptq(method="ptq", activations="none", **options))
        else:
            quantize_denoiser("x", model, {}, recorded("tiny_class").trajectories, Ptq(method="ptq", **options), seed=0)

    with pytest.raises(UnsupportedModelError, match="Identity has no Linear or Conv2d or Embedding"):
        run(nn.Identity())
    with pytest.raises(UnsupportedModelError, match="kept by the recipe"):
        run(nn.Sequential(nn.Linear(3, 3)), keep=["*"])
    with pytest.raises(RecipeError, match="'attn' fits no layer"):
        run(nn.Sequential(nn.Linear(3, 3)), keep=["attn"])


@pytest.mark.parametrize("chosen", [{"effective_bits": 8}, {"float_activations": 0.5}, {"attention": "all"}], ids=str)
def test_calls_of_the_denoiser_do_not_grow_with_its_layers(
    chosen: dict[str, Any], recorded: Callable[[str], Any]
) -> None:
    own = recorded("tiny_class")

    def calls(keep: list[str]) -> int:
        counted: list[int] = []
        handle = own.denoiser.register_forward_pre_hook(lambda *_: counted.append(1))
        options = Ptq(method="ptq", **W4A4, **chosen, keep=keep)
        found = quantize_denoiser(own.source.denoiser, own.denoiser, own.forms, own.trajectories, options, 0)
        handle.remove()
        layers.append(len(found.layers))
        return len(counted)

    layers: list[int] = []
    assert calls(["transformer_blocks.1.*"]) == calls([])
    assert layers[0] < layers[1] - 5


def test_progress_is_told(recorded: Callable[[str], Any]) -> None:
    own = recorded("tiny_class")
    told: list[tuple[int, int]] = []
    options = Ptq(method="ptq", keep=["transformer_blocks.*"])
    quantize_denoiser(
        own.source.denoiser, own.denoiser, own.forms, own.trajectories, options, 0, lambda *step: told.append(step)
    )
    assert told[:2] == [(1, 2), (2, 2)]
