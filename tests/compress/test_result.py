"""What an artifact stores of what was found, and what the report says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffpress.compress.changes import Changes
from diffpress.compress.plan import plan_rows
from diffpress.compress.quantized_layer import Format, QuantizedLayer
from diffpress.compress.result import (
    QuantizationResult,
    changes_of,
    drop_what_does_not_shrink_,
    edits_and_tensors,
    load_result,
    save_result,
)
from diffpress.compress.rounding import to_half
from diffpress.export.source import Form, forms_of
from diffpress.kernels import unpack_codes


def nbytes(forms: Mapping[str, Form]) -> int:
    return sum(form.size_bytes for form in forms.values())


CASES: list[tuple[str, dict[str, Any], str]] = [
    ("tiny_class", {"weights": 4, "activations": 4}, "W4A4"),
    ("tiny_class", {"weights": 2}, "W2A8"),
    ("tiny_class", {"weights": 4, "activations": "none", "group_size": 8}, "W4 g8"),
    ("tiny_class", {"weights": 4, "activations": "none"}, "W4"),
    ("tiny_class", {"format": "float8"}, "FP8"),
]


@pytest.mark.parametrize(("source", "options", "format"), CASES, ids=[format for *_, format in CASES])
def test_plan_rows_add_up(
    source: str,
    options: dict[str, Any],
    format: str,
    recorded: Callable[[str], Any],
    quantized: Callable[..., QuantizationResult],
) -> None:
    own, found = recorded(source), quantized(source, **options)
    changes = changes_of(found, own.forms)
    rows = plan_rows(own.source.denoiser, own.forms, changes)
    before, packed = own.forms, forms_of(changes.tensors)
    assert sum(row.source_bytes for row in rows) == nbytes(before)
    assert sum(row.bytes for row in rows) == nbytes({**before, **packed})
    assert len({row.module for row in rows}) == len(rows)
    assert {row.component for row in rows} == {own.source.denoiser}
    by_module = {row.module: row for row in rows}
    formats = {edit.module: edit for edit in changes.edits}
    for module, row in by_module.items():
        if module in found.layers:
            assert row.bytes < row.source_bytes
            assert row.shape == found.layers[module].codes.shape
            assert row.format.split(" ")[0] == formats[module].words().split(" ")[0]
        else:
            assert (row.format, row.bytes) == ("float16", row.source_bytes)
            assert row.reason
        assert row.error == found.sensitivity.get(module)
    assert by_module["transformer_blocks.0.attn1.to_q"].format == format
    # One scale a row is no group.
    assert by_module["pos_embed.proj"].format == "W8"


def test_a_parameter_of_the_model_itself_stands_for_its_own() -> None:
    forms = {"table": Form((3, 4), torch.float32), "a.weight": Form((2, 5), torch.bfloat16)}
    rows = plan_rows("x", forms, Changes())
    assert [(row.module, row.shape, row.format, row.bytes) for row in rows] == [
        ("table", (3, 4), "float32", 48),
        ("a", (2, 5), "bfloat16", 20),
    ]


def full(bits: int, activation_bits: int | None, group_size: int | None = None, float8: bool = False) -> QuantizedLayer:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 5, 2, 1), generator=generator, dtype=torch.int8)
    scale = torch.rand(3, generator=generator) if group_size is None else torch.rand(3, 2, generator=generator)
    steps = None if activation_bits is None else torch.rand(4, generator=generator)
    return QuantizedLayer(
        Format(bits, activation_bits, group_size, float8),
        codes.to(torch.float8_e4m3fn) if float8 else codes,
        scale,
        steps,
    )


@pytest.mark.parametrize(
    ("layer", "word"),
    [(full(4, 4), "W4A4"), (full(3, 6), "W3A6"), (full(2, None, 8), "W2 g8"), (full(8, 8, None, True), "FP8")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_edit_a_layer_with_the_tensors_it_names(layer: QuantizedLayer, word: str) -> None:
    (edit,), tensors = edits_and_tensors(QuantizationResult("unet", {"a.b": layer}))
    assert (edit.component, edit.module, edit.words()) == ("unet", "a.b", word)
    assert (edit.asymmetric, edit.smoothed) == (False, False)
    expected = {"a.b.weight", "a.b.weight_scale"}
    assert tensors.keys() == (expected if layer.activation_scale is None else expected | {"a.b.activation_scale"})
    codes = tensors["a.b.weight"]
    unpacked = codes if layer.format.float8 else unpack_codes(codes, 10, layer.format.weight_bits)
    assert torch.equal(unpacked.float(), layer.codes.flatten(1).float())
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize(
    ("scale", "stored"), [(0.0123, torch.float16), (-(2.0**-20), torch.float16), (2.0**-24 * 1.5, torch.float32)]
)
def test_weight_scales_are_stored_in_half_where_that_is_exact(scale: float, stored: torch.dtype) -> None:
    layer = replace(full(8, 8), weight_scale=to_half(torch.full((3,), scale)))
    tensor = edits_and_tensors(QuantizationResult("unet", {"a": layer}))[1]["a.weight_scale"]
    assert tensor.dtype == stored
    assert torch.equal(tensor.float(), layer.weight_scale)


def test_zero_points_smoothing_and_biases_are_stored_where_there_are_some() -> None:
    layer = QuantizedLayer(
        Format(8, 8),
        torch.zeros(3, 5, dtype=torch.int8),
        torch.ones(3),
        torch.ones(2),
        torch.zeros(2),
        torch.ones(5),
        torch.ones(3),
    )
    (edit,), tensors = edits_and_tensors(QuantizationResult("unet", {"a": layer}))
    assert (edit.asymmetric, edit.smoothed) == (True, True)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        "a.weight": (3, 5),
        "a.weight_scale": (3,),
        "a.activation_scale": (2,),
        "a.zero_point": (2,),
        "a.smoothing": (5,),
        "a.bias": (3,),
    }


@pytest.mark.parametrize(("columns", "shrinks"), [(5, False), (6, False), (7, True)])
def test_layers_that_do_not_shrink_are_dropped(columns: int, shrinks: bool) -> None:
    """8 bits against float16 save a byte a weight; a float16 scale a row costs two, a table of four steps sixteen."""
    layer = QuantizedLayer(Format(8, 8), torch.zeros(4, columns, dtype=torch.int8), torch.ones(4), torch.ones(4))
    found = QuantizationResult("unet", {"a": layer})
    drop_what_does_not_shrink_(found, {"a.weight": Form((4, columns), torch.float16)})
    assert ("a" in found.layers) == shrinks
    assert found.reasons == ({} if shrinks else {"a": "would not be smaller"})


def test_what_was_found_is_read_back_as_it_was_written(
    quantized: Callable[..., QuantizationResult], tmp_path: Path
) -> None:
    found, path = (
        quantized("tiny_class", weights=4, attention="all", asymmetric=True),
        tmp_path / "deep" / "result.safetensors",
    )
    assert load_result(path) is None
    save_result(found, path)
    again = load_result(path)
    assert again is not None
    for name in ("component", "reasons", "sensitivity", "attention", "history"):
        assert getattr(again, name) == getattr(found, name)
    assert list(again.layers) == list(found.layers)
    for name, layer in found.layers.items():
        for key, value in vars(layer).items():
            other = getattr(again.layers[name], key)
            assert torch.equal(other, value) if isinstance(value, Tensor) else other == value
    path.write_bytes(path.read_bytes()[:100])
    assert load_result(path) is None
