"""One reader gives a component's tensors under the names, and in the shapes, that its model has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffpress.export.errors import ModelFileError
from diffpress.export.folder import PipelineFolder
from diffpress.export.source import forms_of, source_tensors

Renaming = Callable[[dict[str, Tensor]], dict[str, Tensor]]
UNET = "diffusion_pytorch_model.safetensors"
ENCODER = "model.safetensors"


@pytest.fixture
def rewritten(tiny_text: Path, tmp_path: Path) -> Callable[[str, str, Renaming], PipelineFolder]:
    """A function: the tiny text pipeline with the tensors of one file changed."""

    def rewrite(component: str, file: str, change: Renaming) -> PipelineFolder:
        folder = Path(shutil.copytree(tiny_text, tmp_path / "model"))
        path = folder / component / file
        save_file(change(load_file(path)), path, metadata={"format": "pt"})
        return PipelineFolder(folder, "my-model")

    return rewrite


def names_of_the_model(tiny_text: Path, component: str) -> dict[str, Tensor]:
    return source_tensors(PipelineFolder(tiny_text, "tiny"), component)


def test_tensors_are_as_stored(tiny_text: Path) -> None:
    tensors = names_of_the_model(tiny_text, "unet")
    stored = load_file(tiny_text / "unet" / UNET)
    assert tensors.keys() == stored.keys()
    assert all(torch.equal(tensors[name], value) for name, value in stored.items())
    assert {form.dtype for form in forms_of(tensors).values()} == {torch.float16}


def test_a_text_encoder_as_it_is_published(rewritten: Callable[..., PipelineFolder], tiny_text: Path) -> None:
    """Stable Diffusion, SDXL, SD3 and FLUX store CLIP's tensors under `text_model.`."""

    def published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"text_model.{name.removeprefix('text_model.')}": value for name, value in tensors.items()}

    found, expected = source_tensors(rewritten("text_encoder", ENCODER, published), "text_encoder"), None
    expected = names_of_the_model(tiny_text, "text_encoder")
    assert found.keys() == expected.keys() != set()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_old_vae_whose_attention_has_other_names(rewritten: Callable[..., PipelineFolder], tiny_text: Path) -> None:
    """Autoencoders of Stable Diffusion 1 call the projections of attention query, key, value and proj_attn."""
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = {}
        for name, value in tensors.items():
            for new, former in words.items():
                name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
            changed[name] = value
        return changed

    stored = load_file(tiny_text / "vae" / UNET)
    assert old(stored).keys() != stored.keys()
    found = source_tensors(rewritten("vae", UNET, old), "vae")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], value) for name, value in stored.items())


def test_what_the_model_has_no_place_for_is_left_out(rewritten: Callable[..., PipelineFolder], tiny_text: Path) -> None:
    folder = rewritten("text_encoder", ENCODER, lambda own: own | {"text_model.embeddings.position_ids": torch.ones(1)})
    assert source_tensors(folder, "text_encoder").keys() == names_of_the_model(tiny_text, "text_encoder").keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda own: {name: value for name, value in own.items() if name != "conv_in.weight"}, "has no conv_in.weight"),
        (
            lambda own: own | {"conv_in.weight": torch.zeros(8, 4, 1, 1)},
            r"holds conv_in.weight as \[8, 4, 1, 1\], but by its config.json it is \[8, 4, 3, 3\]",
        ),
        (
            lambda own: {name.replace("conv_in.", "conv_in.base_layer."): value for name, value in own.items()},
            r"has a LoRA that is not merged \(conv_in.base_layer.bias\). Merge it with `fuse_lora\(\)`",
        ),
        (
            lambda own: own | {"conv_in.lora_A.default.weight": torch.zeros(1, 4)},
            r"has a LoRA that is not merged \(conv_in.lora_A.default.weight\)",
        ),
    ],
    ids=["absent", "misshapen", "base layer", "adapter"],
)
def test_a_checkpoint_that_is_not_its_models_is_refused(
    rewritten: Callable[..., PipelineFolder], change: Renaming, words: str
) -> None:
    with pytest.raises(ModelFileError, match=f"my-model: unet {words}"):
        source_tensors(rewritten("unet", UNET, change), "unet")


def test_a_file_of_another_size_is_refused(tiny_text: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_text, tmp_path / "model"))
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"block_out_channels": [8, 24]}))
    with pytest.raises(ModelFileError, match=r"but by its config\.json it is"):
        source_tensors(PipelineFolder(folder, "my-model"), "unet")
