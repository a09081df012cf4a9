"""Exports of a tiny random pipeline of every kind, and of a packed one; each is made once a session."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from diffpress.export.artifact import load_pipeline, write_pipeline
from diffpress.export.folder import PipelineFolder
from diffpress.export.onnx.export import export_onnx
from diffpress.export.portable.manifest import ExportManifest

STEPS, GUIDANCE = 6, 3.0


@pytest.fixture(scope="session")
def named_class(tiny_class: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiTPipeline that learned its variance too, and whose classes have names."""
    torch.manual_seed(3)
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
    vae = DiTPipeline.from_pretrained(tiny_class, local_files_only=True).vae
    folder = tmp_path_factory.mktemp("named-class") / "pipeline"
    DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    # As published pipelines have it; saving leaves it out.
    names = {"id2label": {str(number): f"digit {number}" for number in range(10)}}
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | names))
    return folder


@pytest.fixture(scope="session")
def sources(tiny_text: Path, named_class: Path, tiny_pixels: Path) -> dict[str, PipelineFolder]:
    folders = {"prompt": tiny_text, "label": named_class, "plain": tiny_pixels}
    return {name: PipelineFolder(folder, name) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def exports(sources: dict[str, PipelineFolder], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("exports")
    for name, source in sources.items():
        export_onnx(source, work / name, steps=STEPS, guidance_scale=GUIDANCE)
    return {name: work / name for name in sources}


class Packed(NamedTuple):
    """A packed pipeline folder and its export."""

    source: PipelineFolder
    export: Path
    manifest: ExportManifest


@pytest.fixture(scope="session")
def packed(sources: dict[str, PipelineFolder], pack_all: Any, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """The prompt pipeline at four-bit weights and eight-bit activations."""
    work, timesteps = tmp_path_factory.mktemp("packed"), [999.0, 500.0, 1.0]
    edits, tensors = pack_all(load_pipeline(sources["prompt"]).unet, "unet", 4, 8, len(timesteps))
    write_pipeline(work / "source", sources["prompt"], edits, {"unet": tensors}, timesteps)
    source = PipelineFolder(work / "source", "packed")
    return Packed(source, work / "export", export_onnx(source, work / "export", steps=STEPS, guidance_scale=GUIDANCE))
