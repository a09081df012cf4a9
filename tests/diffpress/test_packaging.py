"""The command line around bundles."""

from __future__ import annotations

import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffpress.export.bundle.manifest import here
from diffpress.export.bundle.runner import runner_for
from diffpress.export.errors import UserError
from diffpress.export.folder import PipelineFolder
from diffpress.flow import compress
from diffpress.recipe import load_recipe


@pytest.fixture(scope="session")
def exported(one_block: Path, quick_recipe: Path, made_once: Callable[..., Path]) -> Path:
    """As the tests of exports make it."""
    recipe = load_recipe(quick_recipe, ["export=[onnx]"])
    folder = made_once("exported", lambda folder: compress(PipelineFolder(one_block, "tiny"), recipe, folder / "tiny"))
    return folder / "tiny-onnx"


@pytest.fixture(scope="module")
def packed(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose denoiser is in integers, made by Python's side alone where no runner was built."""
    from diffpress.export.bundle.write import package

    folder = tmp_path_factory.mktemp("packed")
    try:
        runner_for(here(), folder)
    except UserError as error:
        pytest.skip(str(error))
    package(exported, here(), folder / "b.zip")
    return folder / "b.zip"


def test_a_bundle_is_used_as_its_export_is(diffpress, exported, packed, tmp_path):
    for model in (exported, packed):
        result = diffpress("run", model, "--seed", 3, "--out", tmp_path / f"{model.stem}.png")
        assert result.status == 0, result.errors
    left, right = (np.asarray(Image.open(tmp_path / f"{model.stem}.png")) for model in (exported, packed))
    assert (left == right).all()
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(tmp_path / "b")
    (tmp_path / "b" / "diffpress-run").chmod(0o755)
    command = [tmp_path / "b" / "diffpress-run", "--seed", "3", "--threads", "1", "--out", tmp_path / "alone.png"]
    subprocess.run(command, check=True)
    # Integers too: the runner asks for the same kernels, and gives them the same codes.
    assert (np.asarray(Image.open(tmp_path / "alone.png")) == left).mean() > 0.99
    assert "the self test gives its image" in " ".join(diffpress("verify", packed).output.split())
    shown = json.loads(diffpress("inspect", packed, "--json").output)
    assert shown["target"] == here().value
    assert shown["export"]["format"] == "int8"
    assert shown["peak_memory_bytes"] > 0
    assert "measured on" in " ".join(diffpress("inspect", packed).output.split())


@pytest.mark.long
def test_the_zip_is_the_same_whenever_it_is_made(diffpress, exported, packed, tmp_path):
    result = diffpress("package", exported, "--target", here().value, "--out", tmp_path / "b.zip")
    assert result.status == 0, result.errors
    assert f"is ready for {here().value}" in " ".join(result.output.split())
    contents = []
    for path in (packed, tmp_path / "b.zip"):
        with zipfile.ZipFile(path) as archive:
            contents.append(
                {info.filename: (info.CRC, info.external_attr, info.date_time) for info in archive.infolist()}
            )
            assert archive.getinfo("diffpress-run").external_attr >> 16 & 0o111
    # Memory is measured.
    assert [own.pop("bundle.json") is not None for own in contents] == [True, True]
    assert contents[0] == contents[1]


def test_a_jetson_gets_sources_and_how_to_build_them(diffpress, exported, tmp_path):
    result = diffpress("package", exported, "--target", "jetson-orin", "--out", tmp_path / "b.zip")
    assert result.status == 0, result.errors
    assert "not tried here" in " ".join(result.output.split())
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        assert {"source/main.cpp", "source/third_party/nlohmann/json.hpp", "licenses/nlohmann-LICENSE"} <= set(
            archive.namelist()
        )
        text = archive.read("README.txt").decode()
    assert "g++ -std=c++17 -O2 source/*.cpp -o diffpress-run -ldl" in text
    assert "manylinux_2_28_aarch64" in text


@pytest.mark.parametrize("command", ["run", "verify", "inspect"])
def test_a_damaged_bundle_is_refused(diffpress, packed, tmp_path, command):
    path = tmp_path / "b.zip"
    content = bytearray(packed.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    result = diffpress(command, path, *(["--out", tmp_path / "a.png"] if command == "run" else []))
    assert result.status == 2
    assert "b.zip" in result.errors
    assert not (tmp_path / "a.png").exists()


def test_wrong_input_is_refused_and_nothing_written(diffpress, exported, one_block, packed, tmp_path):
    for words, said in (
        ((exported, "--target", here().value, "--out", tmp_path / "b.tar"), "must end in .zip"),
        ((one_block, "--target", here().value, "--out", tmp_path / "b.zip"), "is no ONNX export"),
        ((packed, "--target", here().value, "--out", tmp_path / "b.zip"), "is no ONNX export"),
        ((exported, "--target", here().value, "--out", exported / "b.zip"), "lies in"),
    ):
        result = diffpress("package", *words)
        assert result.status == 2, words
        assert said in " ".join(result.errors.split())
    assert list(tmp_path.iterdir()) == []
    result = diffpress("run", packed, "--prompt", "a", "--out", tmp_path / "a.png")
    assert result.status == 2
    assert "does not draw prompts" in " ".join(result.errors.split())
    assert str(packed.name) in result.errors


@pytest.mark.long
def test_the_runner_follows_a_step_plan(diffpress, tiny_class, quick_recipe, tmp_path):
    recipe = load_recipe(quick_recipe, ["sampling.steps=6", "steps={method: inherit, speedup: 1.3}", "export=[onnx]"])
    compress(PipelineFolder(tiny_class, "tiny"), recipe, tmp_path / "tiny")
    export = tmp_path / "tiny-onnx"
    plan = json.loads((export / "export.json").read_text())["step_plan"]
    assert len({call["graph"] for call in plan["calls"]["6"]}) > 1
    assert diffpress("package", export, "--target", here().value, "--out", tmp_path / "b.zip").status == 0
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        archive.extractall(tmp_path / "b")
    (tmp_path / "b" / "diffpress-run").chmod(0o755)
    assert diffpress("run", export, "--label", 4, "--seed", 3, "--out", tmp_path / "python.png").status == 0
    command = [tmp_path / "b" / "diffpress-run", "--label", "4", "--seed", "3", "--out", tmp_path / "alone.png"]
    subprocess.run(command, check=True)
    left, right = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("python", "alone"))
    assert (left == right).mean() > 0.99


def test_graphs_for_another_engine_are_refused(diffpress, exported, tmp_path):
    folder, out = tmp_path / "folded", tmp_path / "b.zip"
    folder.mkdir()
    data = json.loads((exported / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps({**data, "form": "int8 folded"}))
    result = diffpress("package", folder, "--target", here().value, "--out", out)
    assert (result.status, out.exists()) == (2, False)
    assert "is in a form for TensorRT" in " ".join(result.errors.split())
