"""Exports of a tiny random pipeline of every kind, and of a packed one; each is made where it is asked for, once a session."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from diffpress.export.artifact import load_pipeline, write_pipeline
from diffpress.export.folder import PipelineFolder
from diffpress.export.onnx.export import export_onnx
from diffpress.export.portable.manifest import ExportManifest, read_export

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
        num_layers=1,
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
def sources(one_block_text: Path, named_class: Path, one_block: Path) -> dict[str, PipelineFolder]:
    folders = {"prompt": one_block_text, "label": named_class, "plain": one_block}
    return {name: PipelineFolder(folder, name) for name, folder in folders.items()}


class Exports(dict[str, Path]):
    """The export of each kind of source, made when it is first asked for."""

    def __init__(self, make: Callable[[str], Path]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, kind: str) -> Path:
        self[kind] = self.make(kind)
        return self[kind]


@pytest.fixture(scope="session")
def exports(sources: dict[str, PipelineFolder], made_once: Callable[..., Path]) -> Exports:
    def make(kind: str) -> Path:
        def export(folder: Path) -> None:
            export_onnx(sources[kind], folder / "export", steps=STEPS, guidance_scale=GUIDANCE)

        return made_once(f"export-{kind}", export) / "export"

    return Exports(make)


class Packed(NamedTuple):
    """A packed pipeline folder and its export."""

    kind: str
    source: PipelineFolder
    export: Path
    manifest: ExportManifest


@pytest.fixture(scope="session", params=["plain", pytest.param("prompt", marks=pytest.mark.long)])
def packed(
    request: pytest.FixtureRequest, one_block: Path, tiny_text: Path, pack_all: Any, made_once: Callable[..., Path]
) -> Packed:
    """A pipeline whose denoiser has four-bit weights and eight-bit activations."""
    kind, timesteps = request.param, [999.0, 500.0, 1.0]
    original = PipelineFolder(one_block if kind == "plain" else tiny_text, kind)

    def make(folder: Path) -> None:
        edits, tensors = pack_all(load_pipeline(original).unet, "unet", 4, 8, len(timesteps))
        write_pipeline(folder / "source", original, edits, {"unet": tensors}, timesteps)
        guidance = GUIDANCE if kind == "prompt" else None
        export_onnx(PipelineFolder(folder / "source", kind), folder / "export", steps=STEPS, guidance_scale=guidance)

    folder = made_once(f"packed-{kind}", make)
    export = folder / "export"
    return Packed(kind, PipelineFolder(folder / "source", kind), export, read_export(export))
