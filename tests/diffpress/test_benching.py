"""`diffpress bench`: every way to run a model, timed in one run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from diffpress.export.folder import PipelineFolder
from diffpress.flow import compress
from diffpress.recipe import load_recipe


@pytest.fixture(scope="session")
def made(one_block: Path, quick_recipe: Path, made_once: Callable[..., Path]) -> Path:
    """An artifact and its export, as the tests of exports make them."""
    recipe = load_recipe(quick_recipe, ["export=[onnx]"])
    return made_once("exported", lambda folder: compress(PipelineFolder(one_block, "tiny"), recipe, folder / "tiny"))


def test_an_artifact_is_timed_packed_and_as_it_is_loaded(diffpress, made: Path) -> None:
    found = json.loads(diffpress("bench", made / "tiny", "--steps", 2, "--repeats", 2, "--json").output)
    ways = [own["way"] for own in found["ways"]]
    assert ways in (["all layers packed"], ["all layers packed", "as diffpress.load leaves it"])
    assert found["steps"] == 2
    assert found["ways"][0]["ratio"] == 1
    assert all(own["image_ms"] > 0 for own in found["ways"])


def test_an_export_is_timed_in_every_engine(diffpress, made: Path) -> None:
    found = json.loads(diffpress("bench", made / "tiny-onnx", "--repeats", 1, "--json").output)
    assert [own["way"].split()[0] for own in found["ways"]] == ["onnx", "openvino"]
    result = diffpress("bench", made / "tiny-onnx", "--engine", "onnx", "--repeats", 1)
    assert result.status == 0, result.errors
    assert "ms an image" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--engine", "onnx"], "is no export, and runs in torch"),
        (["tiny-onnx", "--device", "cuda"], "exports run where their engine does"),
        (["tiny-onnx", "--engine", "tflite"], "exports run with onnx, openvino"),
        (["tiny-onnx", "--steps", "999"], "999"),
    ],
    ids=["engine", "device", "unknown engine", "steps"],
)
def test_what_cannot_run_so_is_refused(diffpress, made: Path, arguments: list[str], message: str) -> None:
    result = diffpress("bench", made / arguments[0], *arguments[1:])
    assert result.status == 2
    assert message in " ".join(result.errors.split())
