"""Edits: what may be written in them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from diffpress.export.edits import Edit, Pack, QuantizeAttention, edits_of


def pack(component: str, module: str) -> Pack:
    return Pack(component=component, module=module, weight_bits=4, activation_bits=8)


def test_edits_of_keeps_the_order_and_only_the_component() -> None:
    edits = [pack("unet", "b"), pack("vae", "x"), pack("unet", "a")]
    assert [edit.module for edit in edits_of("unet", edits)] == ["b", "a"]


@pytest.mark.parametrize("wrong", [{"weight_bits": 5}, {"activation_bits": 16}, {"surprise": 1}, {"kind": "drop"}])
def test_edits_hold_only_what_is_known(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Pack.model_validate({"component": "unet", "module": "a", "weight_bits": 4, "activation_bits": 8, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"activation_bits": None}, "needs a group_size"),
        ({"group_size": 64}, "nothing else takes one"),
        ({"activation_bits": None, "group_size": 0}, "group_size"),
        ({"float8": True}, "float8 has 8 bits"),
        ({"weight_bits": 8, "activation_bits": None, "group_size": 64, "float8": True}, "float8 has 8 bits"),
        ({"weight_bits": 8, "float8": True, "asymmetric": True}, "asymmetric needs"),
        ({"activation_bits": None, "group_size": 64, "asymmetric": True}, "asymmetric needs"),
    ],
)
def test_edits_hold_only_what_fits_together(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pack.model_validate({"component": "unet", "module": "a", "weight_bits": 4, "activation_bits": 8, **wrong})


def test_edits_written_before_there_were_other_formats_are_read() -> None:
    old = {"kind": "pack", "component": "unet", "module": "a", "weight_bits": 4, "activation_bits": 8}
    assert Pack.model_validate(old) == pack("unet", "a")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"weight_bits": 4, "activation_bits": 8}, "W4A8"),
        ({"weight_bits": 3, "activation_bits": 6, "asymmetric": True, "smoothed": True}, "W3A6"),
        ({"weight_bits": 4, "activation_bits": None, "group_size": 64}, "W4 g64"),
        ({"weight_bits": 8, "activation_bits": 8, "float8": True}, "FP8"),
    ],
)
def test_the_word_for_a_format(options: dict[str, Any], word: str) -> None:
    assert Pack(component="unet", module="a", **options).words() == word


@pytest.mark.parametrize(("integer_values", "word"), [(False, "attention Q·K int8"), (True, "attention int8")])
def test_the_word_for_attention(integer_values: bool, word: str) -> None:
    assert QuantizeAttention(component="unet", module="a", integer_values=integer_values).words() == word


def test_an_edit_is_what_its_kind_says() -> None:
    read = TypeAdapter(Edit).validate_python
    assert read({"kind": "quantize_attention", "component": "unet", "module": "a"}) == QuantizeAttention(
        component="unet", module="a"
    )
    assert read(pack("unet", "a").model_dump()) == pack("unet", "a")
    for wrong in ({"kind": "quantize_attention", "weight_bits": 4}, {"kind": "drop"}, {}):
        with pytest.raises(ValueError, match=r"weight_bits|drop|kind"):
            read({"component": "unet", "module": "a", **wrong})
