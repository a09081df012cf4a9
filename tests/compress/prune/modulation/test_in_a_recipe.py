"""Modulation collapse the whole way: alone, and before what rounds the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffpress import flow, measuring
from diffpress.calibration.conditions import conditions
from diffpress.calibration.cost import parameter_count
from diffpress.calibration.sampling import Sampling, sample
from diffpress.export.artifact import load, load_pipeline, verify
from diffpress.export.edits import Factorize, Pack
from diffpress.export.errors import RecipeError
from diffpress.export.folder import PipelineFolder
from diffpress.export.runtime import FactorizedLinear, PackedLayer
from diffpress.recipe import parse_recipe

QUICK = {"sampling": {"steps": 3}, "record": {"trajectories": 2, "batch": 2}, "prune": {"method": "modulation"}}
QUANTIZE = {"method": "ptq", "weights": 8, "activations": 8}


@pytest.fixture(autouse=True)
def measured_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "MEASURED", 2)
    monkeypatch.setattr(measuring, "REPEATS", 1)


def images(pipeline: Any) -> Tensor:
    return sample(pipeline, conditions(pipeline, "builtin", 2, 0, "compare"), Sampling(3)).images


@pytest.mark.long
def test_alone_it_makes_an_artifact_that_draws_as_the_original(family: Callable[[str], Path], tmp_path: Path) -> None:
    source = PipelineFolder(family("Lumina 2"), "Lumina 2")
    artifact = flow.compress(source, parse_recipe(QUICK), tmp_path / "out")
    verify(artifact.path)
    assert {edit.kind for edit in artifact.manifest.edits} == {"factorize"}
    sizes = artifact.manifest.metrics["size_bytes"]
    assert sizes["candidate"] < sizes["reference"]
    original, collapsed = load_pipeline(source), load(artifact.path)
    fewer = sum(
        (layer.in_features + layer.out_features) * edit.rank - layer.weight.numel() + (layer.bias is None)
        for edit in artifact.manifest.edits
        if isinstance(edit, Factorize)
        for layer in [original.transformer.get_submodule(edit.module)]
    )
    assert parameter_count(collapsed.transformer) - parameter_count(original.transformer) == fewer
    # What a modulation errs by, relative, over some layers and steps; images are of sizes around one.
    torch.testing.assert_close(images(collapsed), images(original), rtol=0, atol=1e-3)


@pytest.mark.long
def test_what_is_collapsed_is_left_out_of_rounding(family: Callable[[str], Path], tmp_path: Path) -> None:
    source = PipelineFolder(family("PixArt-Sigma"), "PixArt-Sigma")
    artifact = flow.compress(source, parse_recipe(QUICK | {"quantize": QUANTIZE}), tmp_path / "out")
    verify(artifact.path)
    factors = {edit.module for edit in artifact.manifest.edits if isinstance(edit, Factorize)}
    packed = {edit.module for edit in artifact.manifest.edits if isinstance(edit, Pack)}
    assert "adaln_single.linear" in factors
    assert packed
    assert not factors & packed
    rows = {row.module: row for row in artifact.manifest.plan}
    for module in factors:
        assert rows[module].format.startswith("rank ")
        assert "time steps and between them" in rows[module].reason
    model: nn.Module = load(artifact.path).transformer
    assert all(isinstance(model.get_submodule(module), FactorizedLinear) for module in factors)
    assert all(isinstance(model.get_submodule(module), PackedLayer) for module in packed)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"prune\.method = 'nothing'"):
        parse_recipe(QUICK | {"prune": {"method": "nothing"}})
    with pytest.raises(RecipeError, match=r"prune\.tolerance = 0"):
        parse_recipe(QUICK | {"prune": {"method": "modulation", "tolerance": 0}})


def test_an_estimate_says_what_it_takes(family: Callable[[str], Path]) -> None:
    from diffpress.estimate import estimate

    found = estimate(PipelineFolder(family("Lumina 2"), "Lumina 2"), parse_recipe(QUICK))
    assert found["seconds"]["prune"] > 0
