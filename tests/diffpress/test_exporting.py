"""The command line around exports: a recipe that exports, verify, inspect and run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffpress.export.folder import PipelineFolder
from diffpress.flow import compress
from diffpress.recipe import load_recipe


@pytest.fixture(scope="session")
def exported(one_block: Path, quick_recipe: Path, made_once: Callable[..., Path]) -> Path:
    """The folder that a recipe with `export: [onnx]` leaves beside its artifact."""
    recipe = load_recipe(quick_recipe, ["export=[onnx]"])
    folder = made_once("exported", lambda folder: compress(PipelineFolder(one_block, "tiny"), recipe, folder / "tiny"))
    return folder / "tiny-onnx"


def test_verify_and_inspect_know_exports(diffpress, exported):
    assert "the self test gives its image" in " ".join(diffpress("verify", exported).output.split())
    assert json.loads(diffpress("inspect", exported, "--json").output)["format"].startswith("int8")
    assert "sha256" in diffpress("inspect", exported).output


def test_export_draws_what_the_artifact_draws(diffpress, exported, tmp_path):
    """At most a few codes fall on the other side of a rounding boundary: far less than two seeds differ."""
    images = []
    for model, seed in ((exported, 1), (exported.with_name("tiny"), 1), (exported, 2)):
        path = tmp_path / f"{len(images)}.png"
        result = diffpress("run", model, "--seed", seed, "--out", path)
        assert result.status == 0, result.errors
        images.append(np.asarray(Image.open(path)).astype(float))
    same, other = (np.abs(images[0] - image).mean() for image in images[1:])
    assert same < 0.1 * other


def test_export_command_says_how_well_it_agrees(diffpress, one_block, tmp_path):
    result = diffpress("export", one_block, "--to", "onnx", "--out", tmp_path / "float")
    assert result.status == 0, result.errors
    assert "no graph differs from torch by more than" in " ".join(result.output.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float"]


def test_engine_that_does_not_fit_is_refused(diffpress, exported, tiny_pixels, tmp_path):
    status, _, errors = diffpress("run", exported, "--engine", "torch", "--out", tmp_path / "a.png")
    assert status == 2
    assert "runs with --engine onnx" in errors
    status, _, errors = diffpress("run", tiny_pixels, "--engine", "onnx", "--out", tmp_path / "a.png")
    assert status == 2
    assert "Export it first" in " ".join(errors.split())


def test_damaged_export_is_refused(diffpress, exported, tmp_path):
    import shutil

    damaged = shutil.copytree(exported, tmp_path / "damaged")
    graph = next(damaged.rglob("*.onnx"))
    graph.write_bytes(graph.read_bytes()[:-1])
    for command in (["verify", damaged], ["run", damaged, "--out", tmp_path / "a.png"]):
        status, _, errors = diffpress(*command)
        assert status == 2
        assert graph.name in errors


def test_steps_without_a_table_name_those_there_are(diffpress, exported, tmp_path):
    status, _, errors = diffpress("run", exported, "--steps", 7, "--out", tmp_path / "a.png")
    assert status == 2
    assert "10, 15, 20, 25, 30" in " ".join(errors.split())
    assert "`sampling.steps` in the recipe" in " ".join(errors.split())
