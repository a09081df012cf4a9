"""Which layers are quantized, and to what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from diffpress.calibration.observe import LayerInput
from diffpress.compress.layers import (
    choose_formats,
    find_layers,
    high_format,
    select_high_precision,
    stored_bits,
    weights_only,
)
from diffpress.compress.options import Ptq
from diffpress.compress.overlay import overlaid
from diffpress.compress.quantized_layer import Format, QuantizedLayer
from diffpress.export.errors import RecipeError, UnsupportedModelError
from diffpress.export.runtime import factorize_layer


def model() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "entry": nn.Conv2d(3, 8, 3),
            "time": nn.Linear(4, 8),
            "grouped": nn.Conv2d(8, 8, 3, groups=4),
            "circular": nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
            "norm": nn.GroupNorm(2, 8),
            "words": nn.Embedding(9, 8),
            "blocks": nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_k": nn.Linear(8, 8)})]),
            "exit": nn.Linear(8, 3),
        }
    )


GOOD = ["entry", "time", "words", "blocks.0.to_q", "blocks.0.to_k", "exit"]


def options(**chosen: Any) -> Ptq:
    return Ptq(method="ptq", **chosen)


def test_every_layer_of_a_known_kind_is_found_or_has_a_reason() -> None:
    layers, reasons = find_layers(model(), options())
    assert list(layers) == GOOD
    assert reasons == {"grouped": "grouped convolution (4 groups)", "circular": "convolution with padding 'circular'"}


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (["entry"], {"entry"}),
        (["*.to_*"], {"blocks.0.to_q", "blocks.0.to_k"}),
        (["blocks.?.to_[q]", "exit"], {"blocks.0.to_q", "exit"}),
        (["*o*", "exit"], {"words", "blocks.0.to_q", "blocks.0.to_k", "grouped", "exit"}),
    ],
    ids=lambda names: ", ".join(sorted(names)),
)
def test_kept_layers_are_left_alone(keep: list[str], kept: set[str]) -> None:
    layers, reasons = find_layers(model(), options(keep=keep))
    assert {name for name, reason in reasons.items() if reason == "kept by the recipe"} == kept
    assert list(layers) == [name for name in GOOD if name not in kept]


@pytest.mark.parametrize("pattern", ["blocks.0.to_w", "blocks.1.to_q", "norm", "TIME", "nothing.like.it"])
def test_a_pattern_that_fits_nothing_is_refused_with_what_is_near(pattern: str) -> None:
    with pytest.raises(RecipeError) as caught:
        find_layers(model(), options(keep=["entry", pattern]))
    message = str(caught.value)
    assert f"quantize.keep: {pattern!r} fits no layer" in message
    assert any(name in message for name in GOOD)
    if pattern.startswith("blocks"):
        assert "blocks.0.to_q" in message


def test_a_model_of_which_everything_is_kept_is_refused_with_the_reasons() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"ModuleDict has no Linear or Conv2d or Embedding.*kept by the rec"
    ):
        find_layers(model(), options(keep=["*"]))
    with pytest.raises(UnsupportedModelError, match=r"grouped convolution \(4 groups\)"):
        find_layers(nn.Sequential(nn.Conv2d(8, 8, 3, groups=4)), options())


@pytest.mark.parametrize("keep", [[], ["*"]])
def test_a_model_without_layers_is_refused(keep: list[str]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"Sequential has no Linear or Conv2d or Embedding that could be"):
        find_layers(nn.Sequential(nn.GELU()), options(keep=keep))


def test_tied_weights_are_quantized_where_they_are_stored() -> None:
    own = model()
    own.all_tied_weights_keys = {"blocks.0.to_k.weight": "blocks.0.to_q.weight"}  # type: ignore[assignment]
    layers, reasons = find_layers(own, options())
    assert "blocks.0.to_q" in layers
    assert reasons["blocks.0.to_k"] == "its weight is that of blocks.0.to_q.weight"


def test_what_an_earlier_stage_replaced_is_left_alone_while_that_is_worn() -> None:
    own, factors = model(), factorize_layer(nn.Linear(4, 8), 2)
    with overlaid(own, {"time": lambda _forward: factors.forward}):
        layers, reasons = find_layers(own, options())
    assert list(layers) == [name for name in GOOD if name != "time"]
    assert reasons["time"] == "an earlier stage made a FactorizedLinear of it"
    assert "time" in find_layers(own, options())[0]


def seen(conditioning: bool) -> LayerInput:
    nothing = torch.zeros(1)
    return LayerInput(nothing, nothing, nothing, nothing[None], conditioning)


ASKED: list[tuple[dict[str, Any], Format]] = [
    ({"weights": 8}, Format(8, 8)),
    ({"weights": 4, "activations": 8}, Format(4, 8)),
    ({"weights": 3, "activations": 6}, Format(3, 6)),
    ({"weights": 2, "activations": 4}, Format(2, 4)),
    ({"format": "float8"}, Format(8, 8, None, True)),
    ({"weights": 4, "activations": "none", "group_size": 16}, Format(4, None, 16)),
    ({"weights": 4, "activations": "none"}, Format(4, None, 64)),
]


@pytest.mark.parametrize(("chosen", "format"), ASKED, ids=lambda value: str(value))
def test_edges_and_conditioning_keep_eight_bits_and_others_get_what_is_asked(
    chosen: dict[str, Any], format: Format
) -> None:
    """The edges in groups of 32 of their 45 and 80 columns, whatever is asked, the other in a row of its 40."""
    layers = {"in": nn.Conv2d(5, 8, 3), "time": nn.Linear(40, 8), "a": nn.Linear(80, 8), "b": nn.Conv2d(8, 8, 3)}
    layers["out"] = nn.Linear(80, 3)
    edges = {"out": "last", "in": "first"}
    formats, reasons = choose_formats(layers, {name: seen(name == "time") for name in layers}, edges, options(**chosen))
    assert formats["in"] == formats["out"] == Format(8, None, 32)
    assert formats["time"] == Format(8, None, 40)
    assert formats["a"] == formats["b"] == format
    assert reasons == {
        "in": "first layer: weights in 8 bits, inputs in float",
        "time": "conditioning layer: weights in 8 bits, inputs in float",
        "out": "last layer: weights in 8 bits, inputs in float",
    }


@pytest.mark.parametrize(
    ("layer", "group_size", "expected"),
    [
        (nn.Linear(80, 8), 64, 64),
        (nn.Linear(80, 8), 100, 80),
        (nn.Linear(80, 8), None, 80),
        (nn.Conv2d(5, 8, 3), 64, 45),
        (nn.Embedding(9, 8), None, 8),
    ],
)
def test_groups_are_no_longer_than_a_row(layer: nn.Module, group_size: int | None, expected: int) -> None:
    assert weights_only(layer, 4, group_size) == Format(4, None, expected)


def test_safe_formats_keep_their_kind() -> None:
    assert high_format(Format(4, 4)) == Format(8, 8)
    assert high_format(Format(2, None, 16)) == Format(8, None, 16)


def rounded(size: int, bits: int, rows: int = 1) -> QuantizedLayer:
    return QuantizedLayer(Format(bits, 8), torch.zeros(rows, size, dtype=torch.int8), torch.ones(rows))


def at_eight(layers: dict[str, QuantizedLayer]) -> dict[str, QuantizedLayer]:
    return {name: replace(layer, format=high_format(layer.format)) for name, layer in layers.items()}


def average(layers: dict[str, QuantizedLayer], chosen: list[str]) -> float:
    """Bits a weight, a scale of 16 bits for each row counted."""
    sizes = {name: layer.codes.numel() for name, layer in layers.items()}
    bits = {name: 8 if name in chosen else layer.format.weight_bits for name, layer in layers.items()}
    scales = 16 * sum(len(layer.codes) for layer in layers.values())
    return (sum(sizes[name] * bits[name] for name in layers) + scales) / sum(sizes.values())


@pytest.mark.parametrize("seed", range(20))
def test_more_bits_never_break_the_budget_and_leave_no_room_for_another(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 1000, (12,), generator=generator).tolist()
    bits = torch.tensor([2, 3, 4])[torch.randint(3, (12,), generator=generator)].tolist()
    layers = {
        str(index): rounded(*pair, rows=1 + index % 2) for index, pair in enumerate(zip(sizes, bits, strict=True))
    }
    gains = dict(zip(layers, torch.randn(12, generator=generator).tolist(), strict=True))
    for budget in (4.0, 4.3, 5.0, 6.5, 8.0):
        chosen = select_high_precision(gains, layers, at_eight(layers), budget)
        assert not chosen or average(layers, chosen) <= budget
        assert all(gains[name] > 0 for name in chosen)
        for name in set(layers) - set(chosen):
            assert gains[name] <= 0 or average(layers, [*chosen, name]) > budget


def test_bits_go_by_gain_a_bit() -> None:
    """The large layer gains most, the small ones more for what they cost: 4 bits more for 150 of 1150 weights, 0.522.

    Three scales of 16 bits take another 0.042 bits a weight.
    """
    layers = {"large": rounded(1000, 4), "small": rounded(100, 4), "smaller": rounded(50, 4)}
    gains, high = {"large": 5.0, "small": 2.0, "smaller": 1.5}, at_eight(layers)
    assert select_high_precision(gains, layers, high, 4.57) == ["smaller", "small"]
    assert select_high_precision(gains, layers, high, 4.56) == ["smaller"]
    assert select_high_precision(gains, layers, high, 8.1) == ["smaller", "small", "large"]
    assert select_high_precision(gains, layers, high, 4) == []


def test_scales_of_groups_count() -> None:
    """At 4 bits in groups of 64 scales take a quarter of a bit in float16, half a bit where they cannot be stored so."""
    half = QuantizedLayer(Format(4, None, 64), torch.zeros(16, 640, dtype=torch.int8), torch.ones(16, 10))
    layer = replace(half, weight_scale=half.weight_scale * (1 + 2**-12))
    assert stored_bits(half) == 4.25 * layer.codes.numel()
    assert stored_bits(layer) == 4.5 * layer.codes.numel()
