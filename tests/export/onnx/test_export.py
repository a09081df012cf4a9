"""Float exports of every kind of pipeline, run without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from diffpress.export.artifact import load_pipeline
from diffpress.export.engines.onnxruntime import ONNXRUNTIME
from diffpress.export.errors import ArtifactError, OutputError, UnsupportedModelError, UserError
from diffpress.export.folder import PipelineFolder
from diffpress.export.onnx.export import export_onnx
from diffpress.export.onnx.selftest import FLOAT_LIMIT
from diffpress.export.portable.conditions import PromptConditioner
from diffpress.export.portable.manifest import EXPORT, check_files, is_export, read_export
from diffpress.export.portable.pipeline import PortablePipeline
from diffpress.export.portable.verify import verify_export

CONDITIONS = {"prompt": ["red car", "a slice of pizza"], "label": ["7", "digit 2"], "plain": ["", ""]}
SEEDS = [11, 2**32 + 5]


def torch_images(source: PipelineFolder, conditions: list[str], guidance_scale: float) -> Any:
    pipeline = load_pipeline(source)
    arguments: dict[str, Any] = {"num_inference_steps": 6, "output_type": "np"}
    if source.name == "prompt":
        arguments |= {"prompt": conditions, "guidance_scale": guidance_scale}
    elif source.name == "label":
        labels = [int(text.removeprefix("digit ")) for text in conditions]
        arguments |= {"class_labels": labels, "guidance_scale": guidance_scale}
    else:
        arguments["batch_size"] = len(conditions)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS[: len(conditions)]]
    return pipeline(**arguments, generator=generators).images


@pytest.mark.parametrize(
    "kind", ["prompt", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("label", "plain"))]
)
@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
def test_images_equal_torch(
    sources: dict[str, PipelineFolder], exports: dict[str, Path], kind: str, guidance_scale: float
) -> None:
    expected = torch_images(sources[kind], CONDITIONS[kind], guidance_scale)
    scale = None if kind == "plain" else guidance_scale
    found = PortablePipeline(exports[kind], ONNXRUNTIME, threads=1).generate_batch(
        CONDITIONS[kind], SEEDS, guidance_scale=scale
    )
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=FLOAT_LIMIT)


def test_one_image_equals_its_place_in_a_batch(exports: dict[str, Path]) -> None:
    pipeline = PortablePipeline(exports["prompt"], ONNXRUNTIME, threads=1)
    together = pipeline.generate_batch(CONDITIONS["prompt"], SEEDS, steps=4)
    alone = pipeline.generate(CONDITIONS["prompt"][1], SEEDS[1], steps=4)
    # Sums of a batch may be ordered in another way.
    np.testing.assert_allclose(alone, together[1], atol=FLOAT_LIMIT)


def test_tokens_equal_those_of_transformers(sources: dict[str, PipelineFolder], exports: dict[str, Path]) -> None:
    tokenizer = load_pipeline(sources["prompt"]).tokenizer
    pipeline = PortablePipeline(exports["prompt"], ONNXRUNTIME, threads=1)
    texts = ["", "Red  CAR", "slice of pizza, zebra!", "slice of pizza " * 9]
    expected = tokenizer(texts, padding="max_length", max_length=16, truncation=True, return_tensors="np").input_ids
    assert isinstance(pipeline._conditioner, PromptConditioner)
    np.testing.assert_array_equal(pipeline._conditioner.tokenize(texts), expected)


def test_manifest_describes_the_export(exports: dict[str, Path]) -> None:
    manifest = read_export(exports["label"])
    assert sorted(manifest.components) == ["decoder", "denoiser"]
    assert sorted(manifest.schedules) == [4, 6, 10, 15, 20, 25, 30, 50]
    assert manifest.components["denoiser"].inputs[0].shape == ("batch", 4, 8, 8)
    assert manifest.components["denoiser"].max_abs_error < 1e-4
    assert (manifest.steps, manifest.guidance_scale, manifest.opset) == (6, 3.0, 21)
    assert set(manifest.files) == {
        path.relative_to(exports["label"]).as_posix() for path in exports["label"].rglob("*") if path.name != EXPORT
    }


@pytest.mark.parametrize("kind", CONDITIONS)
def test_verify(exports: dict[str, Path], kind: str) -> None:
    assert is_export(exports[kind])
    assert verify_export(exports[kind], ONNXRUNTIME, threads=1).self_test.rms_error < 1e-4


def test_runs_where_torch_cannot_be_imported(exports: dict[str, Path], tmp_path: Path) -> None:
    script = """
import sys
for name in ("torch", "diffusers", "transformers", "onnx", "onnxscript", "safetensors"):
    sys.modules[name] = None
import numpy
from diffpress.export.engines.onnxruntime import ONNXRUNTIME
from diffpress.export.portable.pipeline import PortablePipeline
from diffpress.export.portable.verify import verify_export
verify_export(__import__("pathlib").Path(sys.argv[1]), ONNXRUNTIME)
numpy.save(sys.argv[2], PortablePipeline(sys.argv[1], ONNXRUNTIME, threads=1).generate("red car", seed=11))
"""
    saved = tmp_path / "image.npy"
    command = [sys.executable, "-c", script, str(exports["prompt"]), str(saved)]
    subprocess.run(command, check=True, cwd=tmp_path)
    here = PortablePipeline(exports["prompt"], ONNXRUNTIME, threads=1).generate("red car", seed=11)
    np.testing.assert_allclose(np.load(saved), here, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("prompt", {"steps": 7}, "Use one of 4, 6, 10"),
        ("label", {"condition": "1000"}, "no class"),
        ("label", {"condition": "zebra"}, "or one of digit 0"),
        ("plain", {"condition": "a cat"}, "neither prompt nor label"),
        ("plain", {"guidance_scale": 2.0}, "no guidance"),
    ],
)
def test_wrong_requests_are_named(exports: dict[str, Path], kind: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        PortablePipeline(exports[kind], ONNXRUNTIME, threads=1).generate(**arguments)


@pytest.fixture
def copied(exports: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exports["plain"], tmp_path / "export"))


def test_a_changed_byte_is_found(copied: Path) -> None:
    data = bytearray((copied / "denoiser.onnx.data").read_bytes())
    data[100] ^= 1
    (copied / "denoiser.onnx.data").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"denoiser\.onnx\.data is not what was saved"):
        verify_export(copied, ONNXRUNTIME)


def test_missing_files_are_found_and_strangers_are_not_read(copied: Path) -> None:
    (copied / "extra.bin").write_bytes(b"x")
    assert check_files(copied, read_export(copied)) == ["extra.bin"]
    (copied / "selftest.npy").unlink()
    with pytest.raises(ArtifactError, match=r"selftest\.npy is missing"):
        verify_export(copied, ONNXRUNTIME)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 99}, "update diffpress"),
        ({"steps": "many"}, "damaged"),
        ({"surprise": 1}, "damaged"),
        ({"files": {"../escape": {"size_bytes": 1, "sha256": "0"}}}, "leaves the folder"),
        ({"files": {}}, "lists no digest"),
    ],
)
def test_a_bad_manifest_is_refused(copied: Path, change: dict[str, Any], words: str) -> None:
    data = json.loads((copied / EXPORT).read_text())
    (copied / EXPORT).write_text(json.dumps(data | change))
    with pytest.raises(ArtifactError, match=words):
        verify_export(copied, ONNXRUNTIME)


def test_an_export_of_schema_1_is_read(copied: Path) -> None:
    data = json.loads((copied / EXPORT).read_text()) | {"schema_version": 1}
    old = {key: value for key, value in data.items() if key not in ("form", "form_reason", "worst_case")}
    (copied / EXPORT).write_text(json.dumps(old))
    assert verify_export(copied, ONNXRUNTIME).form == "uint8 x int8"


def test_another_image_fails_the_self_test(copied: Path) -> None:
    manifest = read_export(copied)
    data = json.loads((copied / EXPORT).read_text())
    data["self_test"]["seed"] = manifest.self_test.seed + 1
    (copied / EXPORT).write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="self test differs"):
        verify_export(copied, ONNXRUNTIME)


def test_another_pipeline_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UnsupportedModelError, match=r"Supported are StableDiffusionPipeline, .*DiTPipeline"):
        export_onnx(PipelineFolder(tmp_path, "flux"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_thresholding_scheduler_is_refused_and_leaves_nothing(
    sources: dict[str, PipelineFolder], tmp_path: Path
) -> None:
    shutil.copytree(sources["plain"].path, tmp_path / "clips")
    diffusers.DDIMScheduler(thresholding=True).save_pretrained(tmp_path / "clips" / "scheduler")
    with pytest.raises(UnsupportedModelError, match="thresholding=True"):
        export_onnx(PipelineFolder(tmp_path / "clips", "clips"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips"]


def test_a_folder_of_somebody_else_is_kept(sources: dict[str, PipelineFolder], tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(OutputError, match="not written by diffpress"):
        export_onnx(sources["plain"], tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "mine"
