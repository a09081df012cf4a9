from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from diffpress.export.errors import RecipeError
from diffpress.recipe import Recipe, load_recipe, parse_recipe, preset_text, presets, reference, reference_rows

WIDTHS = {"balanced": (8, 8), "small": (4, 8), "tiny": (4, 4), "w4": (4, "none"), "w8": (8, "none")}

SPEEDUPS = {
    "fast": (1.8, False),
    "faster": (2.5, False),
    "fastest": (3.5, False),
    "balanced-fast": (1.8, True),
    "balanced-faster": (2.5, True),
    "balanced-fastest": (3.5, True),
}


def test_presets_are_recipes():
    assert presets() == sorted({*WIDTHS, *SPEEDUPS})
    for name, widths in WIDTHS.items():
        options = load_recipe(name).quantize
        assert options is not None
        assert (options.weights, options.activations) == widths
        assert options.method == ("qalora" if name in ("small", "tiny") else "ptq")


def test_presets_that_spend_less_a_step_are_of_their_speed_up():
    for name, (speedup, packed) in SPEEDUPS.items():
        recipe = load_recipe(name)
        assert recipe.steps is not None
        assert recipe.steps.speedup == speedup
        assert recipe.quantize == (load_recipe("balanced").quantize if packed else None)
        assert recipe.sampling == load_recipe("balanced").sampling


def test_a_step_plan_is_exported_and_feedback_is_not_yet():
    assert parse_recipe({"steps": {"method": "inherit"}, "export": ["onnx"]}).export == ["onnx"]
    with pytest.raises(RecipeError, match="feedback cannot be exported yet"):
        parse_recipe({"steps": {"method": "feedback"}, "export": ["onnx"]})


def test_file_and_preset_give_the_same_recipe(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(preset_text("small"))
    assert load_recipe(path) == load_recipe("small")


def test_overrides_reach_nested_keys_and_win_over_the_file():
    recipe = load_recipe(
        "small", ["quantize.weights=3", "record.trajectories=3", "sampling.guidance_scale=1.5"], seed=7
    )
    assert recipe.quantize is not None
    assert (recipe.quantize.weights, recipe.record.trajectories, recipe.seed) == (3, 3, 7)
    assert recipe.sampling.guidance_scale == 1.5


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"quantise": {"method": "ptq"}}, ["'quantise'", "did you mean 'quantize'", "sampling"]),
        ({"quantize": {"method": "ptq", "weight": 4}}, ["quantize.weight", "did you mean 'weights'"]),
        ({"quantize": {"weights": 4}}, ["quantize.method is missing", "'ptq' or 'qalora'"]),
        ({"quantize": {"method": "ptq", "weights": 5}}, ["quantize.weights = 5", "2, 3, 4 or 8"]),
        ({"quantize": {"method": "ptq", "activations": 2}}, ["quantize.activations = 2", "4, 6, 8 or 'none'"]),
        ({"quantize": {"method": "magic"}}, ["quantize.method = 'magic'", "'ptq' or 'qalora'"]),
        ({"quantize": {"method": "ptq", "rank": 8}}, ["unknown key 'quantize.rank'"]),
        (
            {"quantize": {"method": "qalora", "held_back": 8}},
            ["quantize.held_back is called quantize.validation_images now"],
        ),
        ({"quantize": {"method": "qalora", "iteratons": 8}}, ["did you mean 'iterations'", "rank"]),
        ({"quantize": {"method": "qalora", "format": "float8"}}, ["quantize.format = 'float8'", "'integer'"]),
        ({"quantize": {"method": "ptq", "format": "float8", "weights": 4}}, ["needs weights: 8 and activations: 8"]),
        (
            {"quantize": {"method": "ptq", "weights": 4, "effective_bits": 3}},
            ["leaves nothing to spend", "weights take 4"],
        ),
        (
            {"quantize": {"method": "ptq", "activations": "none", "float_activations": 0.1}},
            ["float_activations 0.1 spares nothing", "activations none"],
        ),
        (
            {"quantize": {"method": "ptq", "float_activations": 5}},
            ["quantize.float_activations = 5", "less than or equal to 1"],
        ),
        (
            {"quantize": {"method": "ptq", "attention": "values"}},
            ["quantize.attention = 'values'", "'scores' or 'all'"],
        ),
        ({"quantize": {"method": "ptq"}, "record": {"trajectories": 0}}, ["record.trajectories = 0", "greater"]),
        ({"quantize": {"method": "ptq"}, "seed": -1}, ["seed = -1"]),
        ({"quantize": {"method": "ptq"}, "gates": {"size": float("nan")}}, ["gates.size", "finite"]),
        ({"quantize": {"method": "ptq"}, "export": ["coreml"]}, ["export.0 = 'coreml'", "'onnx'"]),
        ({"seed": 1}, ["changes nothing"]),
    ],
)
def test_wrong_recipes_are_refused_with_key_value_and_what_is_allowed(data, words):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data)
    for word in words:
        assert word in str(caught.value)


def test_unknown_preset_suggests_the_nearest():
    with pytest.raises(RecipeError, match=r"Did you mean 'balanced'\? Built in are balanced, balanced-fast, "):
        load_recipe("balaned")


@pytest.mark.parametrize("override", ["quantize.weights", "=4", "seed.more=1", "quantize.weights=[1"])
def test_malformed_overrides_are_refused(override: str):
    with pytest.raises(RecipeError, match="--set"):
        load_recipe("small", ["seed=3", override])


@pytest.mark.parametrize("text", ["quantize: [", "- a list", "42"])
def test_files_that_are_no_mapping_are_refused(tmp_path: Path, text: str):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=str(path)):
        load_recipe(path)


def test_the_docs_hold_the_generated_recipe_reference():
    assert reference() in Path(__file__).parents[2].joinpath("docs", "recipe.md").read_text(encoding="utf-8")


def test_every_key_is_explained():
    assert all(meaning for _, _, meaning in reference_rows())
    assert {key.split(".")[0] for key, _, _ in reference_rows()} == set(Recipe.model_fields)


def test_recipe_survives_yaml():
    recipe = load_recipe("balanced")
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe
