"""Tiny random pipelines of every kind, their exports, and a packed form of one; each is made once a session."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn

from diffpress.export.artifact import load_pipeline, write_pipeline
from diffpress.export.edits import Pack
from diffpress.export.folder import PipelineFolder
from diffpress.export.load import register_with_diffusers
from diffpress.export.onnx.manifest import ExportManifest
from diffpress.export.onnx.export import export_onnx
from diffpress.kernels import code_range, pack_int4, quantize
from diffpress.zoo.emoji import build_text_encoder, train_tokenizer

STEPS, GUIDANCE = 6, 3.0
CAPTIONS = ["slice of pizza", "red car", "blue square", "grinning cat face", "a slice of red cake"]


def tiny_vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def prompt_pipeline(work: Path) -> StableDiffusionPipeline:
    tokenizer = train_tokenizer(CAPTIONS, work / "tokenizer-source")
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 24),
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False)
    parts = (tiny_vae(3), build_text_encoder(tokenizer), tokenizer, unet, scheduler, None, None)
    return StableDiffusionPipeline(*parts, requires_safety_checker=False)


def label_pipeline(work: Path) -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    return DiTPipeline(transformer, tiny_vae(1), DDIMScheduler(clip_sample=False))


def plain_pipeline(work: Path) -> DDIMPipeline:
    unet = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return DDIMPipeline(unet, DDIMScheduler(clip_sample=False))


BUILDERS: dict[str, Callable[[Path], Any]] = {
    "prompt": prompt_pipeline,
    "label": label_pipeline,
    "plain": plain_pipeline,
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    register_with_diffusers()


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PipelineFolder]:
    work = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    for name, build in BUILDERS.items():
        pipeline = build(work)
        # save_pretrained knows nothing of dropout, loading a pipeline always gives eval mode.
        pipeline.save_pretrained(work / name)
    name_classes(work / "label" / "model_index.json")
    return {name: PipelineFolder(work / name, name) for name in BUILDERS}


def name_classes(index: Path) -> None:
    """As published DiT pipelines have it; saving the pipeline leaves it out."""
    names = {"id2label": {str(number): f"digit {number}" for number in range(10)}}
    index.write_text(json.dumps(json.loads(index.read_text()) | names))


@pytest.fixture(scope="session")
def exports(sources: dict[str, PipelineFolder], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("exports")
    for name, source in sources.items():
        export_onnx(source, work / name, steps=STEPS, guidance_scale=GUIDANCE)
    return {name: work / name for name in sources}


def pack(source: PipelineFolder, folder: Path, weight_bits: int, activation_bits: int) -> PipelineFolder:
    """The pipeline with every Linear and Conv2d of its denoiser packed, its scales from one run at each known step."""
    pipeline = load_pipeline(source)
    denoiser = getattr(pipeline, source.denoiser)
    layers = {name: module for name, module in denoiser.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    largest = largest_inputs(pipeline, layers)
    timesteps = [999.0, 500.0, 1.0]
    edits = [
        Pack(component=source.denoiser, module=name, weight_bits=weight_bits, activation_bits=activation_bits)
        for name in layers
    ]
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        weight = layer.weight.detach().flatten(1)
        scale = weight.abs().amax(1) / code_range(weight_bits)[1]
        codes = quantize(weight, scale[:, None], weight_bits)
        tensors[f"{name}.weight"] = codes if weight_bits == 8 else pack_int4(codes)
        tensors[f"{name}.weight_scale"] = scale
        # A scale a step that differs, so that a clock that stands still is seen.
        widths = torch.tensor([1.0, 0.7, 0.5])
        tensors[f"{name}.activation_scale"] = largest[name] / code_range(activation_bits)[1] * widths
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias.detach()
    write_pipeline(folder, source, edits, {source.denoiser: tensors}, timesteps)
    return PipelineFolder(folder, str(folder))


@torch.no_grad()
def largest_inputs(pipeline: Any, layers: dict[str, nn.Module]) -> dict[str, float]:
    largest: dict[str, float] = dict.fromkeys(layers, 0.0)

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            largest[name] = max(largest[name], float(arguments[0].abs().max()))

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    pipeline("red car", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent")
    for handle in handles:
        handle.remove()
    return largest


class Packed(NamedTuple):
    """A packed pipeline folder and its export."""

    source: PipelineFolder
    export: Path
    manifest: ExportManifest


@pytest.fixture(scope="session")
def packed(sources: dict[str, PipelineFolder], tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """The prompt pipeline at four-bit weights and eight-bit activations."""
    work = tmp_path_factory.mktemp("packed")
    source = pack(sources["prompt"], work / "source", weight_bits=4, activation_bits=8)
    return Packed(source, work / "export", export_onnx(source, work / "export", steps=STEPS, guidance_scale=GUIDANCE))
