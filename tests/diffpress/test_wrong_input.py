"""Wrong input: status 2, one message that says what, where and what to do, no traceback, and `--out` as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

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


def test_label_that_the_model_has_not(diffpress, tiny_class, tmp_path):
    status, _, errors = diffpress("run", tiny_class, "--label", 4000, "--out", tmp_path / "a.png")
    assert status == 2
    assert "there is no class 4000" in errors
    assert not (tmp_path / "a.png").exists()


def test_prompt_for_a_model_of_classes(diffpress, tiny_class, tmp_path):
    status, _, errors = diffpress("run", tiny_class, "--prompt", "a cat", "--out", tmp_path / "a.png")
    assert status == 2
    assert "'a cat' is no class number" in errors


def test_pipelines_of_different_kinds_are_not_compared(diffpress, tiny_class, tiny_pixels):
    status, _, errors = diffpress("compare", tiny_class, tiny_pixels)
    assert status == 2
    assert "only two of one kind can be compared" in " ".join(errors.split())


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
    assert not (tmp_path / "digits").exists()
