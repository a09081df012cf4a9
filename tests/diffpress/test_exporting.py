"""The command line around exports: a recipe that exports, verify, inspect and run."""

from __future__ import annotations

import json
import os
import subprocess
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
    assert "is an export: it runs with --engine onnx, openvino" in " ".join(errors.split())
    status, _, errors = diffpress("run", tiny_pixels, "--engine", "onnx", "--out", tmp_path / "a.png")
    assert status == 2
    assert "Export it first" in " ".join(errors.split())


def test_openvino_draws_what_onnxruntime_draws(diffpress, exported, tmp_path):
    images = []
    for engine in ("onnx", "openvino"):
        path = tmp_path / f"{engine}.png"
        result = diffpress("run", exported, "--engine", engine, "--seed", 1, "--out", path)
        assert result.status == 0, result.errors
        images.append(np.asarray(Image.open(path)).astype(int))
    # Where codes lie at an edge, one may be the other, as between torch and onnxruntime.
    assert np.abs(images[0] - images[1]).mean() < 1


def test_an_export_is_compared_with_what_it_was_made_of(diffpress, exported):
    result = diffpress("compare", exported.with_name("tiny"), exported, "--engine", "openvino", "--count", 2, "--json")
    assert result.status == 0, result.errors
    found = json.loads(result.output)
    assert found["psnr_db"] > 45
    assert found["latency_ms"]["ratio"] > 0
    assert found["macs_per_image"] is None
    stored = json.loads(diffpress("inspect", exported, "--json").output)["files"]
    assert found["size_bytes"]["candidate"] == stored["denoiser.onnx.data"]["size_bytes"]
    total = sum(path.stat().st_size for path in exported.rglob("*") if path.is_file())
    assert found["total_size_bytes"]["candidate"] == total


def test_what_cannot_be_compared_with_an_export_is_named(diffpress, exported, tiny_class):
    status, _, errors = diffpress("compare", tiny_class, exported)
    assert status == 2
    assert "only two of one kind can be compared" in " ".join(errors.split())
    status, _, errors = diffpress("compare", exported, exported, "--steps", 7)
    assert status == 2
    assert "no schedule of 7 steps" in " ".join(errors.split())


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


@pytest.mark.long
def test_an_export_for_tensorrt_says_how_engines_are_built(diffpress, exported, tmp_path):
    out = tmp_path / "tensorrt"
    result = diffpress("export", exported.with_name("tiny"), "--to", "tensorrt", "--out", out)
    assert result.status == 0, result.errors
    command = {"TRTEXEC": "echo", "PATH": os.environ["PATH"]}
    lines = subprocess.run([out / "build_engines.sh"], env=command, capture_output=True, text=True, check=True).stdout
    assert "--onnx=denoiser.onnx --saveEngine=denoiser.engine --stronglyTyped" in lines
    assert "--minShapes=sample:1x" in lines
    assert diffpress("verify", out).status == 0
    found = json.loads(diffpress("inspect", out, "--json").output)
    assert found["form"] == "int8 folded"
    assert "build_engines.sh" in found["files"]


@pytest.mark.long
def test_engines_are_built_ahead_and_known(diffpress, exported, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "engines"
    options = ("--to", "tensorrt-rtx", "--target", "sm_86,sm_120", "--out", out)
    result = diffpress("export", exported.with_name("tiny"), *options, "--json")
    assert result.status == 0, result.errors
    assert json.loads(result.output)["engines"]["denoiser"]["layers"]["Int8"] > 0
    (engine,) = json.loads(diffpress("inspect", out, "--json").output)["engines"]
    assert engine["targets"] == ["sm_86", "sm_120"]
    assert diffpress("verify", out).status == 0
    (out / engine["file"]).write_bytes(b"another")
    assert diffpress("verify", out).status == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--to", "tensorrt-rtx"), "--target : TensorRT-RTX builds for sm_75"),
        (("--to", "tensorrt-rtx", "--target", "sm_90"), "--target sm_90: TensorRT-RTX builds for sm_75"),
        (("--to", "onnx", "--target", "sm_86"), "by --to tensorrt-rtx alone"),
    ],
)
def test_targets_that_do_not_fit_are_named_before_any_work(diffpress, tmp_path, one_block, options, words):
    status, _, errors = diffpress("export", one_block, *options, "--out", tmp_path / "out")
    assert status == 2
    assert words in " ".join(errors.split())
    assert not (tmp_path / "out").exists()
