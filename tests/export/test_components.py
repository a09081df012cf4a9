"""Edits of several components in one artifact: denoiser, text encoder and image decoder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffpress.export.apply import apply_edits_
from diffpress.export.artifact import load, load_pipeline, verify
from diffpress.export.edits import Pack, edits_of
from diffpress.export.errors import ArtifactError
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import list_files, read_manifest, write_manifest
from diffpress.export.runtime import PackedLayer

WEIGHTS = "diffusion_pytorch_model.safetensors"
TIMESTEPS = [900.0, 500.0, 100.0]

Packed = tuple[list[Pack], dict[str, Tensor]]


@pytest.fixture(scope="module")
def three_parts(
    tiny_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
    pack_all: Callable[..., Packed],
    pack_weights: Callable[..., Packed],
    save_artifact: Callable[..., Path],
    edited: Callable[..., nn.Module],
) -> tuple[Path, DiffusionPipeline]:
    """An artifact with edits of three components, and the same edits applied to the pipeline in memory."""
    pipeline = load_pipeline(PipelineFolder(tiny_text, "text"))
    packed = {
        "unet": pack_all(pipeline.unet, "unet", 8, 8, len(TIMESTEPS)),
        "text_encoder": pack_weights(pipeline.text_encoder, "text_encoder", 4),
        "vae": pack_weights(pipeline.vae, "vae", 8),
    }
    edits = [edit for part in packed.values() for edit in part[0]]
    tensors = {component: part[1] for component, part in packed.items()}
    path = save_artifact(tiny_text, tmp_path_factory.mktemp("artifact") / "parts", edits, tensors, TIMESTEPS)
    for component, part in packed.items():
        edited(getattr(pipeline, component), part, TIMESTEPS)
    return path, pipeline


def image(pipeline: DiffusionPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("red apple", num_inference_steps=3, generator=generator, output_type="pt").images
    return images.contiguous()


def test_three_parts_load_bit_for_bit(three_parts: tuple[Path, DiffusionPipeline], tiny_text: Path) -> None:
    path, in_memory = three_parts
    manifest = verify(path)
    loaded = load(path)
    for component in ("unet", "text_encoder", "vae"):
        packed = [part for part in getattr(loaded, component).modules() if isinstance(part, PackedLayer)]
        assert len(packed) == len(edits_of(component, manifest.edits))
    assert torch.equal(image(loaded), image(in_memory))
    assert not torch.equal(image(loaded), image(load_pipeline(PipelineFolder(tiny_text, "text"))))


def test_steps_are_stored_where_they_are_needed(three_parts: tuple[Path, DiffusionPipeline]) -> None:
    folder = PipelineFolder(three_parts[0], "parts")
    stored = {name: folder.config(name)["quantization_config"]["timesteps"] for name in ("unet", "text_encoder", "vae")}
    assert stored == {"unet": TIMESTEPS, "text_encoder": [], "vae": []}
    assert folder.config("text_encoder")["dtype"] == "float32"


def test_saving_a_loaded_pipeline_keeps_it(three_parts: tuple[Path, DiffusionPipeline], tmp_path: Path) -> None:
    load(three_parts[0]).save_pretrained(tmp_path / "again")
    assert torch.equal(image(DiffusionPipeline.from_pretrained(tmp_path / "again")), image(three_parts[1]))


@pytest.mark.long
def test_plain_loading_in_a_fresh_process(three_parts: tuple[Path, DiffusionPipeline], tmp_path: Path) -> None:
    program = """
import sys, diffpress, torch
from transformers import CLIPTextModel
alone = CLIPTextModel.from_pretrained(sys.argv[2] + "/text_encoder")
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
torch.set_num_threads(1)
pipeline = DiffusionPipeline.from_pretrained(sys.argv[2])
generator = torch.Generator().manual_seed(5)
image = pipeline("red apple", num_inference_steps=3, generator=generator, output_type="pt").images.contiguous()
states = alone(torch.tensor([[1, 5, 2, 7, 3]])).last_hidden_state
save_file({"image": image, "states": states}, sys.argv[1])
"""
    path, in_memory = three_parts
    out = tmp_path / "made.safetensors"
    done = subprocess.run([sys.executable, "-c", program, out, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = load_file(out)
    assert torch.equal(made["states"], in_memory.text_encoder(torch.tensor([[1, 5, 2, 7, 3]])).last_hidden_state)
    assert torch.equal(made["image"], image(in_memory))


def test_old_names_of_attention_give_the_same_artifact(
    tiny_text: Path, tmp_path: Path, pack_weights: Callable[..., Packed], save_artifact: Callable[..., Path]
) -> None:
    """Autoencoders of the first Stable Diffusions have `query` where the model has `to_q`."""
    old = tmp_path / "old"
    shutil.copytree(tiny_text, old)
    file = old / "vae" / WEIGHTS
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, former in names.items():
        tensors = {name.replace(f".{new}.", f".{former}."): tensor for name, tensor in tensors.items()}
    assert tensors.keys() != load_file(file).keys()
    save_file(tensors, file)
    vae = AutoencoderKL.from_pretrained(tiny_text / "vae")
    edits, packed = pack_weights(vae, "vae", 8)
    paths = [
        save_artifact(source, tmp_path / f"{source.name}-artifact", edits, {"vae": packed}, [])
        for source in (old, tiny_text)
    ]
    assert list_files(paths[0]) == list_files(paths[1])
    verify(paths[0])


FORMATS = {
    nn.Linear: {"weight_bits": 8, "activation_bits": 8, "float8": True, "smoothed": True},
    nn.Conv2d: {"weight_bits": 4, "activation_bits": 8, "asymmetric": True, "smoothed": True},
}


@pytest.fixture
def every_table(tiny_pixels: Path, tmp_path: Path, save_artifact: Callable[..., Path]) -> Path:
    """An artifact whose denoiser holds every kind of tensor that an edit may have."""
    model = UNet2DModel.from_pretrained(tiny_pixels / "unet")
    edits = [
        Pack.model_validate({"component": "unet", "module": name, **FORMATS[type(layer)]})
        for name, layer in model.named_modules()
        if type(layer) in FORMATS
    ]
    apply_edits_(model, edits, TIMESTEPS)
    tensors = {
        f"{path}.{name}": torch.rand(tensor.shape).mul(9).to(tensor.dtype)
        for path, layer in model.named_modules()
        if isinstance(layer, PackedLayer)
        for name, tensor in layer.state_dict().items()
        if name != "bias"
    }
    return save_artifact(tiny_pixels, tmp_path / "every", edits, {"unet": tensors}, TIMESTEPS)


def test_all_of_a_packed_layer_but_its_bias_keeps_its_precision(every_table: Path) -> None:
    verify(every_table)
    stored = load_file(every_table / "unet" / WEIGHTS)
    kinds = {name.rpartition(".")[2] for name in stored}
    assert kinds == {"weight", "bias", "weight_scale", "activation_scale", "zero_point", "smoothing"}
    model = load(every_table, torch.bfloat16).unet
    packed = {path for path, layer in model.named_modules() if isinstance(layer, PackedLayer)}
    for name, value in model.state_dict().items():
        path, _, kind = name.rpartition(".")
        assert value.dtype == (stored[name].dtype if path in packed and kind != "bias" else torch.bfloat16), name
        assert torch.equal(value.float(), stored[name].to(value.dtype).float()), name


def test_a_float8_weight_stored_as_anything_else_is_found(every_table: Path) -> None:
    file = every_table / "unet" / WEIGHTS
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn)
    save_file(tensors | {name: tensors[name].float()}, file)
    write_manifest(every_table, read_manifest(every_table).model_copy(update={"files": list_files(every_table)}))
    with pytest.raises(ArtifactError, match=f"unet should hold {name} as torch.float8_e4m3fn"):
        verify(every_table)


def test_a_packed_tensor_of_the_wrong_shape_does_not_load(every_table: Path) -> None:
    file = every_table / "unet" / WEIGHTS
    tensors = load_file(file)
    save_file(tensors | {"conv_in.smoothing": torch.ones(5)}, file)
    with pytest.raises(ArtifactError, match=r"conv_in\.smoothing should have shape \[1\], but has \[5\]"):
        DiffusionPipeline.from_pretrained(every_table)
