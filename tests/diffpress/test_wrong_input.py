"""Wrong input: status 2, one message that says what, where and what to do, no traceback, and `--out` as it was."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffpress.export import tensor_files
from diffpress.export.manifest import MANIFEST

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tiny_class: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_class, tmp_path / "model"))


@pytest.fixture
def refused(diffpress, digests, tmp_path: Path) -> Callable[..., str]:
    """Run `compress`, check that it refuses as it must, and give its message."""

    def run(model: object, recipe: object = "balanced", *more: object, out: Path | None = None) -> str:
        folder = out or tmp_path / "out"
        before = digests(folder) if folder.exists() else None
        status, output, errors = diffpress("compress", model, "--recipe", recipe, "--out", folder, *more)
        assert status == 2
        assert output == ""
        assert errors.count("diffpress:") == 1
        assert "Traceback" not in errors
        assert (digests(folder) if folder.exists() else None) == before
        assert not list(tmp_path.glob(".*diffpress-work"))
        return " ".join(errors.split())

    return run


def test_misspelt_recipe_key(refused, model, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("quantize: {method: ptq, wieghts: 4}\n")
    assert "unknown key 'quantize.wieghts', did you mean 'weights'?" in refused(model, recipe)


def test_missing_recipe_key(refused, model, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("quantize: {weights: 4}\n")
    assert "quantize.method is missing" in refused(model, recipe)


def test_impossible_value(refused, model):
    message = refused(model, "balanced", "--set", "quantize.weights=5")
    assert "quantize.weights = 5: input should be 2, 3, 4 or 8" in message


def test_missing_component(refused, model):
    message = refused(model, "w4", "--set", "quantize.components=[text_encoder]")
    assert "no component 'text_encoder'; its parts are scheduler, transformer, vae" in message


def test_component_whose_inputs_are_not_recorded(refused, model):
    message = refused(model, "balanced", "--set", "quantize.components=[vae]")
    assert "only weights of vae can be rounded: activations must be none" in message


def test_component_without_weights(refused, model):
    message = refused(model, "w4", "--set", "quantize.components=[scheduler]")
    assert "quantize.components: 'scheduler' of" in message


def test_unknown_preset(refused, model):
    assert "there is no recipe 'balancd'. Did you mean 'balanced'?" in refused(model, "balancd")


def test_model_that_does_not_exist(refused):
    assert "there is no folder nowhere" in refused("nowhere")


def test_unknown_zoo_model(refused):
    assert "Did you mean zoo:emoji?" in refused("zoo:emojis")


def test_folder_that_is_no_pipeline(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is no diffusers pipeline: it has no model_index.json" in refused(tmp_path / "empty")


def test_single_file(refused, model):
    assert "is a single file" in refused(model / WEIGHTS)


def test_hub_id_without_network(refused, monkeypatch):
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("network is unreachable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    message = refused("someone/some-model")
    assert "could not be fetched from the hub (ConnectionError: network is unreachable)" in message
    assert "give its folder" in message


def test_pickled_weights_only(refused, model):
    weights = model / WEIGHTS
    weights.rename(weights.with_suffix(".bin"))
    message = refused(model)
    assert "transformer has only pickled weights" in message
    assert "safe_serialization=True" in message


def test_truncated_weights(refused, model):
    weights = model / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{WEIGHTS} is damaged" in refused(model)


def test_flipped_bit_in_the_header(refused, model):
    weights = model / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[8] ^= 0x40
    weights.write_bytes(data)
    assert f"{WEIGHTS} is damaged" in refused(model)


def test_nan_weights_are_named_by_layer(refused, model):
    tensors = load_file(model / WEIGHTS)
    tensors["transformer_blocks.1.ff.net.2.weight"][3, 2] = torch.nan
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    assert "transformer.transformer_blocks.1.ff.net.2 has NaN or infinite weights" in refused(model)


def test_out_that_is_not_ours(refused, model, tmp_path):
    out = tmp_path / "holiday"
    out.mkdir()
    (out / "image.txt").write_text("mine")
    assert "was not written by diffpress" in refused(model, out=out)
    assert (out / "image.txt").read_text() == "mine"


def test_out_that_is_a_file(diffpress, model, tmp_path):
    out = tmp_path / "notes"
    out.write_text("mine")
    status, _, errors = diffpress("compress", model, "--recipe", "balanced", "--out", out)
    assert status == 2
    assert "is a file" in errors
    assert out.read_text() == "mine"


def test_not_enough_disk(refused, model, monkeypatch):
    usage = shutil.disk_usage(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    assert "1 MB free" in refused(model)


def test_not_enough_disk_for_what_is_recorded(refused, model, monkeypatch):
    """The artifact would fit; ten thousand trajectories of fifty steps would not."""
    usage = shutil.disk_usage(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000_000))
    assert "record fewer trajectories" in refused(model, "balanced", "--set", "record.trajectories=10000")


PIPELINES = ("tiny_text", "tiny_class", "tiny_pixels")
LARGE = 2**63


@pytest.fixture
def refused_unread(diffpress, digests, request, monkeypatch, tmp_path) -> Callable[..., str]:
    """Run a command that is refused before any weight is loaded, and give its message.

    In the command, OUT stands for a place in `tmp_path` and the name of a fixture for its pipeline.
    """

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a pipeline was loaded")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", load)

    def run(command: str) -> str:
        words = [str(request.getfixturevalue(word)) if word in PIPELINES else word for word in command.split()]
        words = [word.replace("OUT", str(tmp_path)) for word in words]
        before = digests(tmp_path)
        status, output, errors = diffpress(*words)
        assert status == 2, errors
        assert output == ""
        assert "Traceback" not in errors
        assert digests(tmp_path) == before
        return " ".join(errors.replace("│", " ").split())

    return run


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("run tiny_text --out OUT/a.jpg", "must end in .png"),
        ("run tiny_text --out OUT/folder.png", "folder.png is a folder. Name a file in it"),
        ("run tiny_text --out OUT/file/a.png", "file is a file. Move it away"),
        ("run tiny_text --steps 1001 --out OUT/a.png", "--steps 1001: the scheduler of"),
        (f"run tiny_text --seed {LARGE} --out OUT/a.png", "Invalid value for '--seed'"),
        ("run tiny_text --guidance inf --out OUT/a.png", "--guidance inf must be a finite number"),
        ("run tiny_text --guidance nan --out OUT/a.png", "Invalid value for '--guidance'"),
        ("run tiny_pixels --guidance 3 --out OUT/a.png", "is a DDIMPipeline, which has no guidance"),
        ("run tiny_text --label 3 --out OUT/a.png", "does not draw classes: give --prompt TEXT instead of --label 3"),
        (
            "run tiny_class --prompt cat --out OUT/a.png",
            "does not draw prompts: give --label NUMBER instead of --prompt",
        ),
        ("run tiny_class --out OUT/a.png", "draws classes: give --label NUMBER"),
        ("run tiny_pixels --label 3 --out OUT/a.png", "does not draw classes: leave it out"),
        ("run tiny_pixels --prompt cat --out OUT/a.png", "does not draw prompts: leave it out"),
        ("compare tiny_pixels tiny_pixels --steps 1001", "--steps 1001: the scheduler of"),
        (f"compare tiny_pixels tiny_pixels --seed {LARGE}", "Invalid value for '--seed'"),
        ("compare tiny_pixels tiny_pixels --report OUT/folder.png", "--report"),
        ("compare tiny_class tiny_pixels", "only two of one kind can be compared"),
        ("export tiny_pixels --to onnx --out tiny_pixels", "is the input"),
        ("export tiny_pixels --to onnx --out OUT/file", "is a file"),
        ("zoo train digits --data OUT/file --out OUT", "holds the input"),
        (f"zoo train digits --data OUT/file --out OUT/new --seed {2**31}", "Invalid value for '--seed'"),
        ("compress tiny_class --recipe w8 --out tiny_class", "is the input"),
        (
            f"compress tiny_class --recipe w8 --out OUT/a --seed {LARGE}",
            "seed = 9223372036854775808: input should be less",
        ),
        (f"compress tiny_class --recipe w8 --out OUT/a --set seed={LARGE}", "seed = 9223372036854775808: input should"),
        (
            "compress tiny_class --recipe w8 --out OUT/a --set sampling.steps=1001",
            "sampling.steps = 1001: input should",
        ),
        ("compress tiny_pixels --recipe w8 --out OUT/a --set sampling.guidance_scale=3", "which has no guidance"),
        ("compress tiny_pixels --recipe w8 --out OUT/a --estimate --set sampling.guidance_scale=3", "has no guidance"),
        ("compress tiny_text --recipe w8 --out OUT/a --set sampling.guidance_scale=.inf", "should be a finite number"),
        ("compress tiny_pixels --recipe w8 --out OUT/a --set record.prompts=OUT/file", "draws without prompt or label"),
        ("compress tiny_text --recipe w8 --out OUT/a --set record.prompts=OUT/none", "there is no file"),
        (
            "compress tiny_text --recipe w8 --out OUT/a --set record.prompts=5",
            "record.prompts = 5: input should be a valid",
        ),
        ("compress tiny_class --recipe w8 --out OUT/a --set quantize.components=[]", "quantize.components = []: list"),
        (
            "compress tiny_class --recipe w8 --out OUT/a --set quantize.components=[text_encoders]",
            "has no text encoders",
        ),
        ("compress tiny_text --recipe OUT/latin.yaml --out OUT/a", "latin.yaml is no text in UTF-8"),
        ("compress tiny_text --recipe OUT/wide.yaml --out OUT/a", "wide.yaml is no text in UTF-8"),
        (
            "compress tiny_text --recipe w4 --out OUT/a --set quantize.components=[vae] --set quantize.attention=all",
            "attention all is of the denoiser, which components does not name",
        ),
        ("compress tiny_text --recipe OUT/texts.yaml --out OUT/a", "qalora learns the denoiser, which components"),
    ],
)
def test_what_is_asked_wrongly_is_refused_before_any_weight_is_loaded(refused_unread, tmp_path, command, words):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "latin.yaml").write_bytes("record: {prompts: [grüner Baum]}".encode("latin-1"))
    (tmp_path / "wide.yaml").write_bytes("quantize: {method: ptq}".encode("utf-16"))
    (tmp_path / "texts.yaml").write_text("quantize: {method: qalora, components: [text_encoders], activations: none}")
    assert words in refused_unread(command)


def test_an_image_is_not_put_into_its_model(refused_unread, model):
    assert "lies in the input" in refused_unread("run OUT/model --label 1 --out OUT/model/a.png")


def _set_index(model: Path, **entries: object) -> None:
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, **entries}))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"scheduler": ["diffusers", "NoSuchScheduler"]}, "scheduler is of the class NoSuchScheduler, which diffusers"),
        ({"_class_name": "NoSuchPipeline"}, "the pipeline is of the class NoSuchPipeline, which diffusers"),
        ({"_class_name": ["pipeline", "Mine"]}, "names the pipeline class ['pipeline', 'Mine'], whose code comes with"),
        ({"vae": ["transformers", "NoSuchModel"]}, "vae is of the class NoSuchModel, which transformers"),
    ],
)
def test_a_class_that_is_not_there_is_named(refused_unread, model, entries, words):
    _set_index(model, **entries)
    assert words in refused_unread("compress OUT/model --recipe w8 --out OUT/a")


def test_a_package_that_is_missing_is_named(refused_unread, model):
    if importlib.util.find_spec("torchsde") is not None:
        pytest.skip("torchsde is installed")
    _set_index(model, scheduler=["diffusers", "DPMSolverSDEScheduler"])
    assert "pip install torchsde" in refused_unread("compress OUT/model --recipe w8 --out OUT/a")


def test_settings_that_diffusers_cannot_use_are_its_word(refused, model):
    (model / "scheduler" / "scheduler_config.json").write_text('{"beta_schedule": "none", "num_train_timesteps": 1000}')
    message = refused(model, "w8")
    assert "cannot be loaded by diffusers (NotImplementedError: none is not implemented" in message


def test_a_recipe_with_a_byte_order_mark_is_read(refused, model, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("quantize: {method: ptq, wieghts: 4}\n", encoding="utf-8-sig")
    assert "did you mean 'weights'?" in refused(model, recipe)


def test_a_quota_that_ends_in_the_middle_of_a_write_leaves_out_as_it_was(
    diffpress, digests, model, tmp_path, monkeypatch
):
    def save(tensors: object, path: Path, metadata: object = None) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)")

    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST).write_text('{"files": {}}')
    before = digests(out)
    monkeypatch.setattr(tensor_files, "save_file", save)
    recipe = ("--recipe", "w8", "--set", "sampling.steps=1", "--set", "record.trajectories=1")
    status, _, errors = diffpress("compress", model, *recipe, "--out", out)
    assert status == 2
    assert "shard-00000.safetensors cannot be written: Disk quota exceeded. Your quota is used up" in " ".join(
        errors.split()
    )
    assert digests(out) == before
    assert not list(tmp_path.rglob("*.partial"))


def test_a_fault_of_ours_keeps_its_traceback(diffpress, model, monkeypatch):
    monkeypatch.setattr("diffpress.inspecting.inspect_folder", lambda path: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        diffpress("inspect", model)


def test_a_prompt_is_read_as_it_was_typed_whatever_the_locale(diffpress, tiny_text, tmp_path):
    """Where the locale is ASCII, Python hands on the bytes of other letters one by one."""
    typed = [os.fsencode("grüner").decode("ascii", "surrogateescape"), "gr\udcfcner"]
    for prompt, status in zip(typed, (0, 2), strict=True):
        arguments = ("--steps", 1, "--out", tmp_path / "a.png")
        assert diffpress("run", tiny_text, "--prompt", prompt, *arguments).status == status


def test_label_that_the_model_has_not(diffpress, tiny_class, tmp_path):
    status, _, errors = diffpress("run", tiny_class, "--label", 4000, "--out", tmp_path / "a.png")
    assert status == 2
    assert "there is no class 4000" in errors
    assert not (tmp_path / "a.png").exists()


def test_verify_of_something_else(diffpress, tiny_class, tmp_path):
    assert "neither an artifact nor an export" in " ".join(diffpress("verify", tiny_class).errors.split())
    assert diffpress("verify", tmp_path / "missing").status == 2


def test_device_that_is_not_there(refused, model):
    assert "--device cuda:7 cannot be used here" in refused(model, "balanced", "--device", "cuda:7")


@pytest.mark.parametrize("content", [b"no archive", None])
def test_training_data_of_another_kind(diffpress, tmp_path, content):
    data = tmp_path / "data.npz"
    if content is None:
        np.savez(data, something=np.zeros(3))
    else:
        data.write_bytes(content)
    status, _, errors = diffpress("zoo", "train", "digits", "--data", data, "--out", tmp_path / "digits")
    assert status == 2
    assert "must be an npz file with the arrays train_x and train_y" in " ".join(errors.split())
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]
