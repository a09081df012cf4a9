"""Text encoders of transformers with their weights packed: written, verified, loaded."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from diffpress.export.apply import apply_edits_
from diffpress.export.artifact import verify
from diffpress.export.edits import Pack
from diffpress.export.errors import ArtifactError, UnsupportedModelError
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import list_files, read_manifest, write_manifest
from diffpress.export.runtime import PackedLayer

WEIGHTS = "model.safetensors"
TOKENS = torch.tensor([[1, 5, 2, 7, 3]])

Packed = tuple[list[Pack], dict[str, Tensor]]


@dataclass(frozen=True)
class Encoder:
    """A class of text encoders, a pipeline folder with one, and the bits that it is packed in."""

    model_class: Any
    source: Path
    bits: int

    def load(self, folder: Path, **options: Any) -> Any:
        return self.model_class.from_pretrained(folder / "text_encoder", **options)

    def original(self) -> Any:
        return self.load(self.source, dtype=torch.float32)


@pytest.fixture(scope="module")
def tiny_t5(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose text encoder is a T5 with one embedding under two names."""
    folder = tmp_path_factory.mktemp("tiny-t5") / "pipeline"
    shutil.copytree(tiny_text, folder, ignore=shutil.ignore_patterns("text_encoder"))
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=30, d_model=16, d_kv=8, d_ff=20, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).half().save_pretrained(folder / "text_encoder")
    rename_class(folder, "text_encoder", "transformers", "T5EncoderModel")
    return folder


def rename_class(folder: Path, component: str, library: str, name: str) -> None:
    """Let model_index.json say that a component is of this class."""
    index = json.loads((folder / "model_index.json").read_text())
    index[component] = [library, name]
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module", params=["clip", "t5"])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    if request.param == "clip":
        return Encoder(CLIPTextModel, request.getfixturevalue("tiny_text"), 4)
    return Encoder(T5EncoderModel, request.getfixturevalue("tiny_t5"), 8)


@pytest.fixture(scope="module")
def artifact(
    encoder: Encoder,
    tmp_path_factory: pytest.TempPathFactory,
    pack_weights: Callable[..., Packed],
    save_artifact: Callable[..., Path],
) -> Path:
    """The text encoder with all its Linear and Embedding layers packed, weights only."""
    edits, tensors = pack_weights(encoder.original(), "text_encoder", encoder.bits)
    out = tmp_path_factory.mktemp("artifact") / "encoder"
    return save_artifact(encoder.source, out, edits, {"text_encoder": tensors}, [])


@pytest.fixture
def spoilt(artifact: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(artifact, tmp_path / "spoilt")
    return tmp_path / "spoilt"


@torch.no_grad()
def states(model: nn.Module) -> Tensor:
    return model(TOKENS).last_hidden_state


def resign(path: Path) -> None:
    """Let the manifest vouch for the files as they are now."""
    write_manifest(path, read_manifest(path).model_copy(update={"files": list_files(path)}))


def test_loaded_is_what_was_packed_bit_for_bit(
    encoder: Encoder, artifact: Path, pack_weights: Callable[..., Packed], edited: Callable[..., nn.Module]
) -> None:
    manifest = verify(artifact)
    loaded, model = encoder.load(artifact), encoder.original()
    assert len([layer for layer in loaded.modules() if isinstance(layer, PackedLayer)]) == len(manifest.edits) >= 8
    before = states(model)
    assert (states(loaded) - before).abs().mean() < 0.3 * before.abs().mean()
    assert not torch.equal(states(loaded), before)
    packed = pack_weights(model, "text_encoder", encoder.bits)
    assert torch.equal(states(loaded), states(edited(model, packed)))


def test_it_is_smaller_and_holds_each_tensor_once(encoder: Encoder, artifact: Path) -> None:
    sizes = [PipelineFolder(path, "").component_bytes("text_encoder") for path in (artifact, encoder.source)]
    assert sizes[0] < sizes[1]
    stored = load_file(artifact / "text_encoder" / WEIGHTS)
    assert not [name for name in stored if "embed_tokens" in name]
    assert [file.name for file in (artifact / "text_encoder").iterdir() if file.suffix != ".json"] == [WEIGHTS]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_loading_in_half_precision_keeps_scales_and_integers(
    dtype: torch.dtype, encoder: Encoder, artifact: Path
) -> None:
    stored = load_file(artifact / "text_encoder" / WEIGHTS)
    model = encoder.load(artifact, dtype=dtype)
    for name, value in model.state_dict().items():
        integers = not stored[name].is_floating_point()
        scale = torch.float32 if name.endswith("_scale") else dtype
        assert value.dtype == (stored[name].dtype if integers else scale), name
        assert torch.equal(value, stored[name].to(value.dtype)), name
    assert states(model).dtype == dtype
    assert torch.isfinite(states(model)).all()


def test_saving_a_loaded_model_keeps_it(encoder: Encoder, artifact: Path, tmp_path: Path) -> None:
    model = encoder.load(artifact)
    model.save_pretrained(tmp_path / "text_encoder")
    again = encoder.load(tmp_path)
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)
    assert torch.equal(states(again), states(model))


def test_copies_are_independent(encoder: Encoder, artifact: Path) -> None:
    model = encoder.load(artifact)
    before, other = states(model), copy.deepcopy(model)
    for tensor in other.state_dict().values():
        tensor.zero_()
    assert torch.equal(states(model), before)
    assert not torch.equal(states(other), before)


def test_verify_compares_every_tensor_with_the_edited_model(spoilt: Path) -> None:
    file = spoilt / "text_encoder" / WEIGHTS
    sound = load_file(file)
    name = next(name for name, tensor in sound.items() if tensor.dtype in (torch.int8, torch.uint8))
    spoilers = {
        "lost": {key: value for key, value in sound.items() if key != name},
        "surplus": sound | {f"{name}.extra": torch.ones(1)},
        "shape": sound | {name: sound[name][:, :-1].contiguous()},
        "dtype": sound | {name: sound[name].float()},
    }
    for tensors in spoilers.values():
        save_file(tensors, file)
        resign(spoilt)
        with pytest.raises(ArtifactError, match=f"text_encoder should hold {name}.* as"):
            verify(spoilt)


def test_a_tensor_of_the_wrong_shape_does_not_load(encoder: Encoder, spoilt: Path) -> None:
    file = spoilt / "text_encoder" / WEIGHTS
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("weight_scale"))
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="mismatch"):
        encoder.load(spoilt)


def test_files_of_older_versions_give_the_same_artifact(
    encoder: Encoder,
    artifact: Path,
    tmp_path: Path,
    pack_weights: Callable[..., Packed],
    save_artifact: Callable[..., Path],
) -> None:
    """CLIP had a prefix and stored its positions, T5 stored its embedding twice."""
    source = tmp_path / "source"
    shutil.copytree(encoder.source, source)
    file = source / "text_encoder" / WEIGHTS
    tensors = load_file(file)
    if encoder.model_class is CLIPTextModel:
        tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
        tensors["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    else:
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    save_file(tensors, file)
    edits, packed = pack_weights(encoder.original(), "text_encoder", encoder.bits)
    again = save_artifact(source, tmp_path / "again", edits, {"text_encoder": packed}, [])
    assert list_files(again) == list_files(artifact)


def test_edits_without_activations_need_no_clock(pack_weights: Callable[..., Packed], tiny_text: Path) -> None:
    model = CLIPTextModel.from_pretrained(tiny_text / "text_encoder")
    assert apply_edits_(model, pack_weights(model, "text_encoder", 8)[0], []) is None
    assert not model._forward_pre_hooks


def test_tied_modules_are_edited_where_the_weight_is(tiny_t5: Path) -> None:
    model = T5EncoderModel.from_pretrained(tiny_t5 / "text_encoder")
    module = "encoder.embed_tokens"
    edit = Pack(component="text_encoder", module=module, weight_bits=8, activation_bits=None, group_size=8)
    with pytest.raises(ArtifactError, match=rf"{module} does not apply: it shares shared\.weight; edit that module"):
        apply_edits_(model, [edit], [])


@pytest.mark.parametrize(
    ("library", "name", "message"),
    [
        ("stable_diffusion", "SafetyChecker", "text_encoder is from stable_diffusion, but only models of"),
        ("transformers", "NoSuchModel", "of the class NoSuchModel, which is no model that the installed transformers"),
        ("diffusers", "DDIMScheduler", "of the class DDIMScheduler, which is no model"),
    ],
)
def test_parts_that_are_no_models_we_know_are_refused(
    library: str, name: str, message: str, encoder: Encoder, spoilt: Path, tmp_path: Path, save_artifact: Any
) -> None:
    edits = read_manifest(spoilt).edits
    rename_class(spoilt, "text_encoder", library, name)
    if library == "diffusers":
        # Where its loader looks for them.
        weights = spoilt / "text_encoder" / "model.safetensors"
        weights.rename(weights.with_name("diffusion_pytorch_model.safetensors"))
    resign(spoilt)
    with pytest.raises(UnsupportedModelError, match=message):
        verify(spoilt)
    with pytest.raises(UnsupportedModelError, match=message):
        save_artifact(spoilt, tmp_path / "out", edits, {"text_encoder": {}}, [])


def test_text_encoders_with_a_projection(
    tiny_text: Path,
    tmp_path: Path,
    pack_weights: Callable[..., Packed],
    save_artifact: Callable[..., Path],
    edited: Callable[..., nn.Module],
) -> None:
    """What Stable Diffusion XL calls `text_encoder_2`."""
    source = tmp_path / "source"
    shutil.copytree(tiny_text, source)
    torch.manual_seed(4)
    config = CLIPTextModel.from_pretrained(tiny_text / "text_encoder").config
    model = CLIPTextModelWithProjection(config).float().eval()
    model.save_pretrained(source / "text_encoder_2")
    rename_class(source, "text_encoder_2", "transformers", "CLIPTextModelWithProjection")
    packed = pack_weights(model, "text_encoder_2", 8)
    path = save_artifact(source, tmp_path / "out", packed[0], {"text_encoder_2": packed[1]}, [])
    verify(path)
    loaded = CLIPTextModelWithProjection.from_pretrained(path / "text_encoder_2")
    assert torch.equal(loaded(TOKENS).text_embeds, edited(model, packed)(TOKENS).text_embeds)
