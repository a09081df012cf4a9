"""Checkpoints of one file, and what they are refused for."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffpress.export.errors import UnsupportedModelError, UserError
from diffpress.export.folder import PipelineFolder
from diffpress.models import resolve

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
"""Of the decoder."""


def unet_name(name: str, levels: int) -> str:
    """What the original code of Stable Diffusion calls a tensor of a UNet with one resnet a level."""
    for own, other in ENDS.items():
        name = re.sub(rf"^{own}\.", f"{other}.", name)
    for level in range(levels):
        down, up = f"down_blocks.{level}.", f"up_blocks.{level}."
        name = name.replace(f"{down}resnets.0", f"input_blocks.{2 * level + 1}.0")
        name = name.replace(f"{down}attentions.0", f"input_blocks.{2 * level + 1}.1")
        name = name.replace(f"{down}downsamplers.0.conv", f"input_blocks.{2 * level + 2}.0.op")
        for layer in range(2):
            name = name.replace(f"{up}resnets.{layer}", f"output_blocks.{2 * level + layer}.0")
            name = name.replace(f"{up}attentions.{layer}", f"output_blocks.{2 * level + layer}.1")
        name = name.replace(f"{up}upsamplers.0", f"output_blocks.{2 * level + 1}.1")
    if re.match(r"(input|output|middle)_block", name):
        for own, other in RESNET.items():
            name = re.sub(rf"^(\w+\.[\d.]+)\.{own}\.", rf"\1.{other}.", name)
    return f"model.diffusion_model.{name}"


def decoder_name(name: str, levels: int) -> str:
    for level in range(levels):
        name = name.replace(f"encoder.down_blocks.{level}.", f"encoder.down.{level}.")
        name = name.replace(f"decoder.up_blocks.{level}.", f"decoder.up.{levels - 1 - level}.")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        for own, other in ATTENTION.items():
            name = name.replace(f".{own}.", f".{other}.")
    name = name.replace(".resnets.", ".block.").replace("samplers.0", "sample").replace("conv_norm_out", "norm_out")
    return f"first_stage_model.{name.replace('conv_shortcut', 'nin_shortcut')}"


def single_file(folder: Path, path: Path) -> dict[str, dict[str, Tensor]]:
    """Write a small Stable Diffusion as its original code would; gives the tensors of its parts."""
    own = PipelineFolder(folder, "source")
    parts = {name: dict(own.tensors(name)) for name in ("unet", "vae", "text_encoder")}
    tensors = {unet_name(name, 2): value for name, value in parts["unet"].items()}
    tensors |= {decoder_name(name, 2): value for name, value in parts["vae"].items()}
    # Published ones have what transformers called them.
    tensors |= {
        f"cond_stage_model.transformer.text_model.{name}": value for name, value in parts["text_encoder"].items()
    }
    for name, value in tensors.items():
        # Attention of the decoder was made of convolutions.
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            tensors[name] = value[:, :, None, None].contiguous()
    save_file(tensors, path)
    return parts


@pytest.fixture
def checkpoint(tiny_text: Path, tmp_path: Path) -> Path:
    """A file with the settings of its pipeline beside it, and no other weights."""
    without = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(tiny_text, tmp_path / "model", ignore=without)
    return tmp_path / "model.safetensors"


def test_a_checkpoint_is_read_with_the_settings_beside_it(checkpoint: Path, tiny_text: Path) -> None:
    parts = single_file(tiny_text, checkpoint)
    made = resolve(str(checkpoint))
    assert made.name == str(checkpoint)
    for component, expected in parts.items():
        found = {name: tensor for name, tensor in made.tensors(component) if name in expected}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name].float(), expected[name].float()) for name in expected)
    assert resolve(str(checkpoint)).path == made.path


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("model.safetensors", False, "says nothing of how its models are built. Put the settings"),
        ("model.safetensors", True, "is damaged"),
        ("model.gguf", True, "holds weights in GGUF. They are rounded already"),
        ("model.ckpt", True, "may run code when it is read"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(checkpoint: Path, name: str, settings: bool, words: str) -> None:
    if not settings:
        shutil.rmtree(checkpoint.with_suffix(""))
    file = checkpoint.with_name(name)
    file.write_bytes(b"GGUF")
    with pytest.raises(UserError, match=words):
        resolve(str(file))


def test_a_checkpoint_of_another_model_is_refused(checkpoint: Path) -> None:
    save_file({"a": torch.ones(2)}, checkpoint)
    with pytest.raises(UserError, match=r"cannot be read with the settings in .*model"):
        resolve(str(checkpoint))


def test_a_pipeline_of_no_single_files_is_refused(tiny_class: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_class, tmp_path / "model")
    save_file({"a": torch.ones(2)}, tmp_path / "model" / "all.safetensors")
    with pytest.raises(
        UnsupportedModelError, match="is of a DiTPipeline, which diffusers does not read from a single file"
    ):
        resolve(str(tmp_path / "model" / "all.safetensors"))
