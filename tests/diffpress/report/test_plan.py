"""Formats in words and colours."""

import pytest

from diffpress.export.edits import Pack, QuantizeAttention
from diffpress.export.manifest import PlanRow
from diffpress.report.plan import PACKED_COLOURS, PLAIN_COLOURS, lines, packed, sensitivity, summary, totals, whole


def make_row(format, error=None, component="unet"):
    return PlanRow(
        component=component, module=format, shape=(4, 4), format=format, source_bytes=64, bytes=8, error=error
    )


@pytest.mark.parametrize("format", ["W4A8", "W4A4", "W2A8", "W3A6", "W8A8", "W8", "W4 g64", "W2 g128", "FP8"])
def test_formats_of_edits_are_packed(format):
    assert packed(format)


@pytest.mark.parametrize("format", ["float32", "float16", "bfloat16", "int64", "float8_e4m3fn", "W", "Wide"])
def test_dtypes_are_not_packed(format):
    assert not packed(format)


@pytest.mark.parametrize(
    "options",
    [
        *({"weight_bits": bits, "activation_bits": inputs} for bits in (2, 3, 4, 8) for inputs in (4, 6, 8)),
        *({"weight_bits": bits, "activation_bits": None, "group_size": 64} for bits in (2, 3, 4, 8)),
        {"weight_bits": 8, "activation_bits": 8, "float8": True},
    ],
)
def test_every_word_that_an_edit_has_for_its_format_is_known(options):
    assert packed(Pack(component="unet", module="a", **options).words())


@pytest.mark.parametrize("integer_values", [False, True])
def test_the_words_of_attention_are_known(integer_values):
    assert packed(QuantizeAttention(component="unet", module="a", integer_values=integer_values).words())
    assert not packed("attention float")


def test_attention_that_was_never_seen_has_no_shape():
    row = make_row("attention float").model_copy(update={"shape": ()})
    assert [line.shape for line in lines([row, row.model_copy(update={"format": "float32"})])] == ["—", "scalar"]


@pytest.mark.parametrize(
    ("formats", "sentence"),
    [
        (["float32"] * 3, "nothing packed, 3 layers left as they were"),
        (["FP8"] * 2 + ["float32"], "FP8, 2 of 3 layers"),
        (["W8"] * 2 + ["W4A4"] * 3 + ["bfloat16"], "W4A4 in 3 and W8 in 2 of 6 layers"),
        (["W8"] * 2 + ["W4 g64"] * 3 + ["W4"], "W4 g64 in 3, W8 in 2 and W4 in 1 of 6 layers"),
        (["W8A8", "attention int8"], "W8A8, 1 of 1 layers; attention int8, 1 of 1 attentions"),
        (["W8A8", "attention float"], "W8A8, 1 of 1 layers; attention in float"),
        (
            ["W8A8", "attention Q·K int8", "attention float", "attention int8"],
            "W8A8, 1 of 1 layers; attention Q·K int8 in 1 and attention int8 in 1 of 3 attentions",
        ),
    ],
)
def test_summary_names_packed_formats_by_how_many_have_them(formats, sentence):
    assert summary([make_row(format) for format in formats]) == sentence


def test_totals_of_a_mixture(mixed_plan):
    parts = totals(mixed_plan)
    assert [(part.format, part.modules, part.before, part.after) for part in parts] == [
        ("W4A4", 60, 60 * 16384, 60 * 2048),
        ("W8", 23, 23 * 16384, 23 * 4096),
        ("float32", 7, 7 * 16384, 7 * 16384),
    ]
    assert (whole(parts).modules, whole(parts).after) == (90, 60 * 2048 + 23 * 4096 + 7 * 16384)


def test_packed_formats_have_colours_of_their_own_and_dtypes_are_grey(mixed_plan):
    assert [part.colour for part in totals(mixed_plan)] == [0, 1, PACKED_COLOURS]
    colours = {part.format: part.colour for part in totals(mixed_plan)}
    assert [line.colour for line in lines(mixed_plan)] == [colours[row.format] for row in mixed_plan]


def test_the_most_common_format_has_the_first_colour():
    parts = totals([make_row(format) for format in ["W4 g64", "FP8", "W8", "W8", "bfloat16", "float32", "float32"]])
    assert [(part.format, part.colour) for part in parts] == [
        ("W8", 0),
        ("FP8", 1),
        ("W4 g64", 2),
        ("float32", 5),
        ("bfloat16", 6),
    ]


def test_no_colour_that_the_style_sheet_lacks():
    formats = ["FP8", "W2A8", "W3A8", "W4 g64", "W4A4", "W4A8", "W8", "bfloat16", "float16", "float32", "int64"]
    colours = [part.colour for part in totals([make_row(format) for format in formats])]
    assert colours == [0, 1, 2, 3, 4, 4, 4, 5, 6, 6, 6]
    assert max(colours) == PACKED_COLOURS + PLAIN_COLOURS - 1


def test_bars_are_of_rows_with_an_error_only(mixed_plan):
    measured = [make_row("W4A4", 2e-3), make_row("W8", 0.0), make_row("FP8", float("inf"))]
    bars = sensitivity([make_row("float32"), *measured, make_row("W4", component="text_encoder")])
    assert [(bar.format, bar.width, bar.text) for bar in bars] == [
        ("FP8", 100.0, "not finite"),
        ("W4A4", 100.0, "2.0 \N{MULTIPLICATION SIGN} 10⁻³"),
        ("W8", 0.0, "0"),
    ]
    assert [bar.name for bar in sensitivity(mixed_plan)] == [f"blocks.{i}.to_q" for i in range(59, 39, -1)]
