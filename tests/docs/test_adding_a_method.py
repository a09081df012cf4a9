"""The method that docs/adding-a-method.md shows is one, put where the doc says and as it stands there."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from diffpress import flow, recipe
from diffpress.calibration.sampling import denoiser_of
from diffpress.compress import methods, options
from diffpress.export.artifact import load, load_pipeline, verify
from diffpress.export.folder import PipelineFolder

DOC = Path(__file__).parents[2] / "docs" / "adding-a-method.md"
OPTIONS, METHOD, ENTRY, SECTION = re.findall(
    r"^```python\n(.*?)^```$", DOC.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)
LINES = 60
"""That the file of a method may take."""


@pytest.fixture
def recipe_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[recipe.Recipe]:
    """Recipes that may name the method."""
    in_options = dict(vars(options))
    exec(OPTIONS, in_options)
    for module in (options, methods, recipe):
        monkeypatch.setattr(module, "MinMax", in_options["MinMax"], raising=False)
    entry = eval(ENTRY, vars(methods))
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, entry))
    file = tmp_path / "method.py"
    file.write_text(METHOD, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(entry.module, file)
    assert spec is not None
    assert spec.loader is not None
    method = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, entry.module, method)
    spec.loader.exec_module(method)
    in_recipe = dict(vars(recipe))
    exec(f"class WithMinMax(Recipe):\n    {SECTION}", in_recipe)
    return in_recipe["WithMinMax"]


def test_the_method_is_short() -> None:
    assert len(METHOD.splitlines()) <= LINES


def test_the_method_makes_an_artifact(tiny_class: Path, recipe_type: type[recipe.Recipe], tmp_path: Path) -> None:
    source = PipelineFolder(tiny_class, "tiny")
    data = {
        "sampling": {"steps": 2},
        "record": {"trajectories": 1, "prompts": ["1"]},
        "quantize": {"method": "minmax", "weights": 4},
    }
    artifact = flow.compress(source, recipe_type.model_validate(data), tmp_path / "out")
    verify(artifact.path)
    assert artifact.manifest.recipe["quantize"] == data["quantize"]
    sizes = artifact.manifest.metrics["size_bytes"]
    assert sizes["candidate"] < sizes["reference"]
    original, packed = denoiser_of(load_pipeline(source)), denoiser_of(load(artifact.path))
    layers = {name: layer for name, layer in original.named_modules() if isinstance(layer, nn.Linear)}
    assert {edit.module for edit in artifact.manifest.edits} == set(layers)
    for name, layer in layers.items():
        # To one row of the unit matrix the answer is one column of the weight, and the bias.
        bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
        stored = (packed.get_submodule(name)(torch.eye(layer.in_features)) - bias).T
        half_a_step = layer.weight.abs().amax(1, keepdim=True) / 7 / 2
        # In float32 the scale is rounded, its product with the code, the sum with the bias and the difference from it.
        largest = layer.weight.abs().max() + bias.abs().max()
        slack = 4 * torch.finfo(torch.float32).eps * largest
        assert bool(((stored - layer.weight).abs() <= half_a_step + slack).all())
