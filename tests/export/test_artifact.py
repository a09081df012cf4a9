"""Artifacts: written, verified, loaded."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffpress.calibration.conditions import conditions
from diffpress.calibration.sampling import Sampling, denoiser_of, sample
from diffpress.export import digests
from diffpress.export.apply import apply_edits_
from diffpress.export.artifact import is_artifact, load, load_pipeline, verify
from diffpress.export.edits import edits_of
from diffpress.export.errors import ArtifactError, ModelFileError
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import MANIFEST, list_files, read_manifest, write_manifest
from diffpress.export.runtime import PackedLayer
from diffpress.export.tensor_files import save_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"
STEPS = 3
SOURCES = ["tiny_text", "tiny_class", "tiny_pixels"]


def image(pipeline: Any) -> Tensor:
    """Two images with other steps than the scales were made for, so that the clock interpolates."""
    wanted = conditions(pipeline, "builtin", 2, seed=3)
    return sample(pipeline, wanted, Sampling(STEPS + 1, 3.0)).images


@pytest.fixture(scope="session")
def compress(save_artifact: Callable[..., Path], pack_all: Callable[..., Any]) -> Callable[..., Path]:
    """A function: an artifact of a source with every packable layer of its denoiser packed in so many bits."""

    def compress(source: Path, out: Path, bits: tuple[int, int]) -> Path:
        pipeline = load_pipeline(PipelineFolder(source, source.name))
        component = PipelineFolder(source, source.name).denoiser
        pipeline.scheduler.set_timesteps(STEPS)
        timesteps = [float(step) for step in pipeline.scheduler.timesteps]
        edits, tensors = pack_all(denoiser_of(pipeline), component, *bits, STEPS)
        return save_artifact(source, out, edits, {component: tensors}, timesteps)

    return compress


def resign(path: Path, **changes: Any) -> None:
    """Let the manifest vouch for the files as they are now."""
    write_manifest(path, read_manifest(path).model_copy(update={"files": list_files(path), **changes}))


@pytest.fixture(scope="module")
def artifacts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, compress: Callable[..., Path]
) -> Callable[..., Path]:
    """A function: the artifact of a named source at so many bits, made once."""
    made: dict[tuple[str, int, int], Path] = {}

    def artifact(source: str, weight_bits: int = 4, activation_bits: int = 8) -> Path:
        key = (source, weight_bits, activation_bits)
        if key not in made:
            out = tmp_path_factory.mktemp("artifact") / source
            made[key] = compress(request.getfixturevalue(source), out, key[1:])
        return made[key]

    return artifact


@pytest.fixture
def spoilt(artifacts: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the smallest artifact, to spoil."""
    shutil.copytree(artifacts("tiny_pixels"), tmp_path / "artifact")
    return tmp_path / "artifact"


def in_memory(source: Path, artifact: Path, pack_all: Callable[..., Any], bits: tuple[int, int]) -> Any:
    """The source pipeline with the same packed modules, built without any of the loading code."""
    folder, manifest = PipelineFolder(source, source.name), read_manifest(artifact)
    pipeline = load_pipeline(folder)
    denoiser = denoiser_of(pipeline)
    edits, packed = pack_all(denoiser, folder.denoiser, *bits, STEPS)
    assert edits == edits_of(folder.denoiser, manifest.edits)
    kept = denoiser.state_dict()
    apply_edits_(denoiser, edits, manifest.timesteps)
    denoiser.load_state_dict(kept | packed, strict=True)
    return pipeline


@pytest.mark.parametrize("bits", [(8, 8), (4, 8)], ids=lambda bits: f"W{bits[0]}A{bits[1]}")
@pytest.mark.parametrize("source", SOURCES)
def test_loaded_is_what_was_packed_bit_for_bit(
    source: str,
    bits: tuple[int, int],
    artifacts: Callable[..., Path],
    pack_all: Callable[..., Any],
    request: pytest.FixtureRequest,
) -> None:
    path, original = artifacts(source, *bits), request.getfixturevalue(source)
    manifest = verify(path)
    assert len(manifest.edits) > 10
    assert is_artifact(path)
    pipeline = load(path)
    packed = [module for module in denoiser_of(pipeline).modules() if isinstance(module, PackedLayer)]
    assert len(packed) == len(manifest.edits)
    images = image(pipeline)
    assert torch.equal(images, image(in_memory(original, path, pack_all, bits)))
    assert torch.isfinite(images).all()
    assert not torch.equal(images, image(load_pipeline(PipelineFolder(original, source))))


def test_plain_from_pretrained_in_a_fresh_process(artifacts: Callable[..., Path], tmp_path: Path) -> None:
    program = """
import sys, diffpress, torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from diffpress.calibration.conditions import conditions
from diffpress.calibration.sampling import Sampling, sample
torch.set_num_threads(1)
images = {}
for path in sys.argv[2:]:
    pipeline = DiffusionPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    wanted = conditions(pipeline, "builtin", 2, seed=3)
    images[path] = sample(pipeline, wanted, Sampling(4, 3.0)).images.contiguous()
save_file(images, sys.argv[1])
"""
    paths = [str(artifacts(source)) for source in SOURCES]
    out = tmp_path / "images.safetensors"
    done = subprocess.run([sys.executable, "-c", program, out, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    images = load_file(out)
    for path in paths:
        assert torch.equal(images[path], image(load(path)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_loading_in_half_precision_keeps_scales_and_integers(
    dtype: torch.dtype, artifacts: Callable[..., Path]
) -> None:
    path = artifacts("tiny_class")
    stored = load_file(path / "transformer" / WEIGHTS)
    pipeline = load(path, dtype)
    for name, value in denoiser_of(pipeline).state_dict().items():
        integers = not stored[name].is_floating_point()
        scale = torch.float32 if name.endswith("_scale") else dtype
        assert value.dtype == (stored[name].dtype if integers else scale), name
        assert torch.equal(value, stored[name].to(value.dtype)), name
    assert torch.isfinite(image(pipeline)).all()
    # So does a later cast of the whole model.
    model = denoiser_of(pipeline).to(torch.float64)
    kept = {name: value for name, value in model.state_dict().items() if name.endswith("_scale")}
    assert all(torch.equal(value, stored[name].float()) for name, value in kept.items())


@pytest.mark.parametrize("source", SOURCES)
def test_saving_a_loaded_pipeline_keeps_it(source: str, artifacts: Callable[..., Path], tmp_path: Path) -> None:
    pipeline = load(artifacts(source))
    pipeline.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again")
    again.set_progress_bar_config(disable=True)
    first, second = denoiser_of(pipeline).state_dict(), denoiser_of(again).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)
    assert torch.equal(image(again), image(pipeline))


def test_the_same_edits_give_the_same_bytes(
    artifacts: Callable[..., Path], tiny_pixels: Path, tmp_path: Path, compress: Callable[..., Path]
) -> None:
    again = compress(tiny_pixels, tmp_path / "again", (4, 8))
    assert list_files(again) == list_files(artifacts("tiny_pixels"))


def test_an_artifact_is_smaller_than_its_source(artifacts: Callable[..., Path], tiny_class: Path) -> None:
    sizes = [PipelineFolder(path, "").component_bytes("transformer") for path in (artifacts("tiny_class"), tiny_class)]
    assert sizes[0] < sizes[1]


def test_a_source_of_variants_loads_without_naming_one(
    tiny_text: Path, tmp_path: Path, compress: Callable[..., Path], artifacts: Callable[..., Path]
) -> None:
    source = tmp_path / "tiny_text"
    shutil.copytree(tiny_text, source)
    for file in list(source.rglob("*.safetensors")):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    # The autoencoder in two files with an index, as large models come.
    file = next((source / "vae").glob("*.safetensors"))
    tensors = load_file(file)
    names = [f"diffusion_pytorch_model.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)]
    places = {name: names[index % 2] for index, name in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: tensors[key] for key, place in places.items() if place == name}, source / "vae" / name)
    index = json.dumps({"metadata": {}, "weight_map": places})
    (source / "vae" / f"{WEIGHTS}.index.fp16.json").write_text(index)
    file.unlink()

    path = compress(source, tmp_path / "artifact", (4, 8))
    verify(path)
    assert not [name for name in list_files(path) if "fp16" in name]
    assert torch.equal(image(load(path)), image(load(artifacts("tiny_text"))))


def test_a_flipped_bit_is_refused_by_verify_and_load(spoilt: Path) -> None:
    file = spoilt / "unet" / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    for check in (verify, load):
        with pytest.raises(ArtifactError, match=f"unet/{WEIGHTS} is not what was saved"):
            check(spoilt)


def test_verify_wants_manifest_and_config_to_agree(spoilt: Path) -> None:
    manifest = read_manifest(spoilt)
    resign(spoilt, timesteps=[step + 1 for step in manifest.timesteps])
    with pytest.raises(ArtifactError, match="disagree about the edits"):
        verify(spoilt)
    resign(spoilt, timesteps=manifest.timesteps, edits=manifest.edits[:-1])
    with pytest.raises(ArtifactError, match="disagree about the edits"):
        verify(spoilt)


@pytest.mark.parametrize("component", ["vae", "scheduler"])
def test_verify_refuses_edits_of_parts_that_carry_none(spoilt: Path, component: str) -> None:
    edits = [edit.model_copy(update={"component": component}) for edit in read_manifest(spoilt).edits]
    resign(spoilt, edits=edits)
    with pytest.raises(ArtifactError, match=f"{component} has no readable edits"):
        verify(spoilt)


def test_verify_refuses_a_config_that_lost_its_edits(spoilt: Path) -> None:
    file = spoilt / "unet" / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]
    file.write_text(json.dumps(config))
    resign(spoilt)
    with pytest.raises(ArtifactError, match="unet has no readable edits"):
        verify(spoilt)


def test_verify_compares_every_tensor_with_the_edited_model(spoilt: Path) -> None:
    file = spoilt / "unet" / WEIGHTS
    sound = load_file(file)
    name = "conv_in.weight"
    assert sound[name].dtype == torch.uint8
    spoilers = {
        "lost": {key: value for key, value in sound.items() if key != name},
        "surplus": sound | {"conv_in.extra": torch.ones(1)},
        "shape": sound | {name: sound[name][:, :-1].contiguous()},
        "dtype": sound | {name: sound[name].float()},
    }
    for tensors in spoilers.values():
        save_file(tensors, file)
        resign(spoilt)
        with pytest.raises(ArtifactError, match=r"unet should hold conv_in\.\w+ as"):
            verify(spoilt)


def test_verify_finds_impossible_scales(spoilt: Path) -> None:
    file = spoilt / "unet" / WEIGHTS
    tensors = load_file(file)
    tensors["conv_in.weight_scale"][0] = float("nan")
    save_file(tensors, file)
    resign(spoilt)
    with pytest.raises(ModelFileError, match=r"unet\.conv_in has NaN"):
        verify(spoilt)


def test_a_source_folder_is_no_artifact(tiny_pixels: Path) -> None:
    assert not is_artifact(tiny_pixels)
    with pytest.raises(ArtifactError, match=f"it has no {MANIFEST}"):
        load(tiny_pixels)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_that_the_umask_leaves(everything: Path, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save_tensors({"a": torch.ones(1)}, tmp_path / "folder" / "a.safetensors")
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    expected = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "folder" / "a.safetensors").stat().st_mode == expected
    weights = [path for path in everything.rglob("*.safetensors") if path.is_file()]
    assert len({path.stat().st_mode for path in weights} | {(everything / "model_index.json").stat().st_mode}) == 1


def test_a_file_that_may_not_be_read_is_named_with_advice(everything: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(digests, "digest", closed)
    with pytest.raises(ArtifactError, match=r"cannot be read: Permission denied\. Change its permissions"):
        load(everything)
