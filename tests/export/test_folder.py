"""A pipeline folder as files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffpress.export.artifact import load_pipeline
from diffpress.export.errors import ModelFileError, UnsupportedModelError
from diffpress.export.folder import PipelineFolder

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tiny_text: Path, tmp_path: Path) -> PipelineFolder:
    """A copy to spoil."""
    shutil.copytree(tiny_text, tmp_path / "model")
    return PipelineFolder(tmp_path / "model", "my-model")


def as_variant(folder: Path, *components: str, variant: str = "fp16") -> None:
    """Rename the weights of components to those of a variant."""
    for component in components:
        for file in (folder / component).glob("*.safetensors"):
            file.rename(file.with_name(file.name.replace(".safetensors", f".{variant}.safetensors")))


def as_shards(component: Path, dot_variant: str = "") -> list[str]:
    """Part the weights of a component into two files and an index."""
    tensors = load_file(component / WEIGHTS)
    names = [f"diffusion_pytorch_model{dot_variant}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    places = {name: names[index % 2] for index, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensors[name] for name, place in places.items() if place == file}, component / file)
    index = {"metadata": {}, "weight_map": places}
    (component / f"{WEIGHTS}.index{dot_variant}.json").write_text(json.dumps(index))
    (component / WEIGHTS).unlink()
    return names


def test_components_and_denoiser(tiny_text: Path, tiny_class: Path, tiny_pixels: Path) -> None:
    text = PipelineFolder(tiny_text, "text")
    assert text.components == {
        "scheduler": "DDIMScheduler",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
    }
    assert [text.denoiser] == text.require("denoiser") == ["unet"]
    assert text.require("vae") == ["vae"]
    assert text.variant is None
    assert PipelineFolder(tiny_class, "class").denoiser == "transformer"
    assert PipelineFolder(tiny_pixels, "pixels").components == {"scheduler": "DDIMScheduler", "unet": "UNet2DModel"}
    with pytest.raises(UnsupportedModelError, match=r"no component 'controlnet'; its parts are .*unet"):
        text.require("controlnet")


def test_libraries_and_text_encoders(copy: PipelineFolder) -> None:
    assert copy.libraries["vae"] == copy.libraries["scheduler"] == "diffusers"
    assert copy.libraries.keys() == copy.components.keys()
    assert copy.text_encoders == ["text_encoder"]
    index = json.loads((copy.path / "model_index.json").read_text())
    index["text_encoder_3"] = ["transformers", "T5EncoderModel"]
    index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
    index["text_encoder_4"] = ["diffusers", "SomethingElse"]
    index["text_encoder_5"] = [None, None]
    (copy.path / "model_index.json").write_text(json.dumps(index))
    several = PipelineFolder(copy.path, "several")
    assert several.text_encoders == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    assert "text_encoder_5" not in several.libraries


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_config_that_cannot_be_read_is_named(copy: PipelineFolder, text: str | None) -> None:
    assert copy.config("unet")["_class_name"] == "UNet2DConditionModel"
    file = copy.path / "unet" / "config.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(ModelFileError, match=r"my-model: unet.*config\.json"):
        copy.config("unet")


def test_tensors_are_as_stored(copy: PipelineFolder) -> None:
    stored = load_file(copy.path / "unet" / WEIGHTS)
    read = dict(copy.tensors("unet"))
    assert read.keys() == stored.keys()
    assert all(torch.equal(read[name], stored[name]) and read[name].dtype == torch.float16 for name in stored)
    assert copy.component_bytes("unet") == 2 * sum(tensor.numel() for tensor in stored.values())
    assert list(copy.tensors("scheduler")) == []


def test_files_are_what_the_pipeline_needs(copy: PipelineFolder) -> None:
    before = copy.files()
    assert {"model_index.json", "scheduler/scheduler_config.json", f"unet/{WEIGHTS}", f"vae/{WEIGHTS}"} <= set(before)
    for name in [
        "unet/pytorch_model.bin",
        "unet/model.onnx",
        "notes.txt",
        "samples/a.png",
        "unet/model.bin.index.json",
    ]:
        (copy.path / name).parent.mkdir(exist_ok=True)
        (copy.path / name).write_text("x")
    save_file({"a": torch.ones(1)}, copy.path / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (copy.path / "README.md").write_text("# Model")
    assert copy.files() == sorted([*before, "README.md"])
    assert copy.digests().keys() == set(copy.files())
    assert copy.size_bytes() == sum((copy.path / name).stat().st_size for name in copy.files())


def test_variant_is_taken_where_there_is_nothing_else(copy: PipelineFolder) -> None:
    as_variant(copy.path, "unet", "text_encoder")
    assert copy.variant == "fp16"
    assert [file.name for file in copy.weight_files("unet")] == ["diffusion_pytorch_model.fp16.safetensors"]
    copy.check()


def test_a_variant_is_taken_that_all_have_who_have_nothing_else(copy: PipelineFolder) -> None:
    """Both halves of one part lie side by side, the other has one of them."""
    shutil.copytree(copy.path / "unet", copy.path / "other")
    as_variant(copy.path, "unet")
    as_variant(copy.path, "text_encoder", "other", variant="bf16")
    shutil.copy(next((copy.path / "other").glob("*.bf16.safetensors")), copy.path / "unet")
    assert copy.variant == "bf16"
    assert [file.name for file in copy.weight_files("unet")] == ["diffusion_pytorch_model.bf16.safetensors"]
    copy.check()
    load_pipeline(copy)


def test_unknown_variants_are_named(copy: PipelineFolder) -> None:
    file = copy.path / "vae" / WEIGHTS
    file.rename(file.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    with pytest.raises(ModelFileError, match=r"my-model: vae .*diffusion_pytorch_model\.non_ema\.safetensors"):
        copy.check()


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_are_read_as_one(copy: PipelineFolder, variant: str) -> None:
    whole = dict(copy.tensors("unet"))
    shards = as_shards(copy.path / "unet", variant)
    copy.check()
    parts = dict(copy.tensors("unet"))
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert copy.variant == (variant[1:] or None)
    assert {f"unet/{name}" for name in [*shards, f"{WEIGHTS}.index{variant}.json"]} <= set(copy.files())


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_what_is_read_is_what_the_loader_takes(copy: PipelineFolder, component: str) -> None:
    """Of a single file beside shards diffusers takes the shards and transformers the file; stale shards are no matter."""
    stem = {"unet": "diffusion_pytorch_model", "text_encoder": "model"}[component]
    folder, single = copy.path / component, copy.path / component / f"{stem}.safetensors"
    tensors = load_file(single)
    shards = [f"{stem}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    places = {name: shards[index % 2] for index, name in enumerate(sorted(tensors))}
    for file in shards:
        own = {name: torch.full_like(tensors[name], 0.5) for name, place in places.items() if place == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    save_file({"stale": torch.ones(1)}, folder / f"{stem}-00001-of-00003.safetensors")
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    loaded = load_pipeline(copy).components[component].state_dict()
    read = dict(copy.tensors(component))
    copy.check()
    assert read.keys() <= loaded.keys()
    assert all(torch.equal(read[name].float(), loaded[name]) for name in read)
    assert {tuple(read[name].unique().tolist()) == (0.5,) for name in read} == (
        {True} if component == "unet" else {False}
    )


@pytest.mark.parametrize("plain", [(), ("unet",), ("unet", "text_encoder")])
def test_a_variant_is_taken_for_every_component_that_has_it(copy: PipelineFolder, plain: tuple[str, ...]) -> None:
    """As diffusers does: some part has that variant only, so that it is asked for, and others may have both."""
    as_variant(copy.path, "unet", "text_encoder", "vae")
    for component in plain:
        (file,) = (copy.path / component).glob("*.fp16.safetensors")
        tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
        save_file(tensors, file.with_name(file.name.replace(".fp16", "")), metadata={"format": "pt"})
    assert copy.variant == "fp16"
    loaded = load_pipeline(copy).components
    for component in ("unet", "text_encoder", "vae"):
        assert [".fp16." in file.name for file in copy.weight_files(component)] == [True]
        states = loaded[component].state_dict()
        assert all(torch.equal(tensor.float(), states[name]) for name, tensor in copy.tensors(component))


def test_shards_without_an_index_are_refused(copy: PipelineFolder) -> None:
    as_shards(copy.path / "unet")
    (copy.path / "unet" / f"{WEIGHTS}.index.json").unlink()
    with pytest.raises(ModelFileError, match=r"unet has the shard .*-00001-of-00002\.safetensors, but no index"):
        copy.check()


@pytest.mark.parametrize("weight_map", ["", "[]", "{}", '{"a": 3}', '{"a": "../x"}'])
def test_an_index_of_shards_that_says_nothing_is_refused(copy: PipelineFolder, weight_map: str) -> None:
    as_shards(copy.path / "unet")
    (copy.path / "unet" / f"{WEIGHTS}.index.json").write_text(f'{{"weight_map": {weight_map}}}')
    with pytest.raises(ModelFileError, match=rf"my-model: unet/{WEIGHTS}\.index\.json .*Copy or download"):
        copy.check()


@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",)])
def test_an_emptied_tokenizer_is_named(copy: PipelineFolder, kept: tuple[str, ...]) -> None:
    for file in (copy.path / "tokenizer").iterdir():
        if file.name not in kept:
            file.unlink()
    with pytest.raises(ModelFileError, match="my-model: tokenizer holds no vocabulary"):
        copy.check()


def test_an_empty_folder_is_named(copy: PipelineFolder) -> None:
    (copy.path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ModelFileError, match="my-model: the folder scheduler is empty"):
        copy.check()


def test_settings_that_are_no_json_are_named(copy: PipelineFolder) -> None:
    (copy.path / "scheduler" / "scheduler_config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ModelFileError, match=r"my-model: scheduler/scheduler_config\.json cannot be read"):
        copy.check()


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_missing_shard_is_named(copy: PipelineFolder, variant: str) -> None:
    shards = as_shards(copy.path / "unet", variant)
    (copy.path / "unet" / shards[1]).unlink()
    with pytest.raises(ModelFileError, match=f"my-model: unet/{shards[1]} is missing"):
        copy.check()


def test_pickles_alone_are_refused(copy: PipelineFolder) -> None:
    (copy.path / "vae" / WEIGHTS).rename(copy.path / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(
        ModelFileError, match=r"vae has only pickled weights \(diffusion_pytorch_model.bin\).*safe_serial"
    ):
        copy.check()


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_weights_are_named(copy: PipelineFolder, kept: int) -> None:
    file = copy.path / "unet" / WEIGHTS
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelFileError, match=f"my-model: unet/{WEIGHTS} is damaged"):
        copy.check()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_impossible_weights_are_named_by_layer(copy: PipelineFolder, wrong: float) -> None:
    file = copy.path / "unet" / WEIGHTS
    tensors = load_file(file)
    tensors["mid_block.resnets.0.conv1.weight"][0, 0, 1, 1] = wrong
    save_file(tensors, file)
    with pytest.raises(ModelFileError, match=r"unet\.mid_block\.resnets\.0\.conv1 has NaN or infinite weights"):
        copy.check()


@pytest.mark.parametrize("component", ["unet", "tokenizer"])
def test_a_missing_component_is_named(copy: PipelineFolder, component: str) -> None:
    shutil.rmtree(copy.path / component)
    with pytest.raises(ModelFileError, match=f"my-model: .*{component}"):
        copy.check()


def test_a_denoiser_without_weights_is_refused(copy: PipelineFolder) -> None:
    (copy.path / "unet" / WEIGHTS).unlink()
    with pytest.raises(ModelFileError, match="unet has no weights"):
        copy.check()
    with pytest.raises(ModelFileError, match="unet has no weights"):
        _ = copy.variant


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, UnsupportedModelError, "my-model is no diffusers pipeline: it has no model_index.json"),
        ("{", ModelFileError, "model_index.json is no JSON"),
        ("[]", UnsupportedModelError, "names no pipeline class"),
        ('{"vae": ["diffusers", "AutoencoderKL"]}', UnsupportedModelError, "names no pipeline class"),
        (
            '{"_class_name": "X", "../unet": ["diffusers", "UNet2DModel"]}',
            ModelFileError,
            "'../unet', which is no name",
        ),
        (
            '{"_class_name": ["pipeline", "Mine"], "unet": [null, null]}',
            UnsupportedModelError,
            "whose code comes with the",
        ),
        ('{"_class_name": "X", "unet": [null, null]}', UnsupportedModelError, "has no part that is told the time step"),
    ],
)
def test_an_index_that_cannot_be_used_is_refused(
    tmp_path: Path, text: str | None, error: type[Exception], message: str
) -> None:
    if text is not None:
        (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(error, match=message):
        _ = PipelineFolder(tmp_path, "my-model").denoiser


def test_a_snapshot_of_links_is_read_like_what_it_links_to(tiny_text: Path, tmp_path: Path) -> None:
    """As the hub's cache keeps it: every file is a link into `blobs`."""
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    blobs.mkdir()
    for index, file in enumerate(sorted(file for file in tiny_text.rglob("*") if file.is_file())):
        shutil.copy(file, blobs / str(index))
        link = snapshot / file.relative_to(tiny_text)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / str(index))
    linked = PipelineFolder(snapshot, "linked")
    linked.check()
    assert linked.digests() == PipelineFolder(tiny_text, "plain").digests()
    assert load_pipeline(linked).unet is not None


def test_gguf_is_refused_with_what_to_take(copy: PipelineFolder) -> None:
    (copy.path / "unet" / WEIGHTS).rename(copy.path / "unet" / "model-Q4_0.gguf")
    with pytest.raises(
        ModelFileError, match=r"unet has only weights in GGUF \(model-Q4_0.gguf\). They are rounded already"
    ):
        copy.check()
