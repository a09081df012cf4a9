"""`diffpress.compile`, on an artifact that is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DiTPipeline, DiTTransformer2DModel
from torch import Tensor

import diffpress
from diffpress.export.artifact import load_pipeline, write_pipeline
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import Manifest, list_files, write_manifest
from diffpress.export.runtime import RuntimePart, StepClock

STEPS = [1000.0, 667.0, 334.0]


@pytest.fixture
def artifact(tiny_class: Path, tmp_path: Path, pack_all: Callable[..., Any]) -> Path:
    """The tiny pipeline in W8A8, with scales that differ from step to step."""
    transformer = DiTTransformer2DModel.from_pretrained(tiny_class, subfolder="transformer", dtype=torch.float32)
    edits, tensors = pack_all(transformer, "transformer", 8, 8, len(STEPS))
    out = tmp_path / "artifact"
    out.mkdir()
    write_pipeline(out, PipelineFolder(tiny_class, "tiny"), edits, {"transformer": tensors}, STEPS)
    manifest = Manifest(
        fingerprint="", versions={}, recipe={}, source={}, timesteps=STEPS, edits=edits, plan=[], metrics={},
        files=list_files(out),
    )  # fmt: skip
    write_manifest(out, manifest)
    return out


def images(pipeline: DiTPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipeline([1, 2], num_inference_steps=3, output_type="np", generator=generator).images)


def test_a_loaded_artifact_makes_the_same_pictures_in_one_graph(artifact: Path, tiny_class: Path) -> None:
    original = images(load_pipeline(PipelineFolder(tiny_class, "tiny")))
    pipeline = diffpress.load(artifact)
    expected = images(pipeline)
    graphs = []

    def backend(module: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    fusions = diffpress.compile(pipeline, backend, fullgraph=True)
    compiled = images(pipeline)
    # The clock's own, and the denoiser's.
    assert len(graphs) == 2
    assert fusions.counts()["layer norm, modulated"] == 9
    # Of codes at most one in a thousand lies so near to two that float32 may choose the other, by one. All of them are off by
    # a twelfth of their step's square already, so this adds 12 thousandths to what rounding costs: a ninth of its root.
    assert (compiled - expected).square().mean() <= 0.012 * (expected - original).square().mean()


@pytest.mark.parametrize("whole", [True, False], ids=["pipeline", "denoiser"])
def test_what_is_not_packed_is_refused(whole: bool, tiny_class: Path) -> None:
    pipeline = load_pipeline(PipelineFolder(tiny_class, "tiny"))
    with pytest.raises(UnsupportedModelError, match=r"DiTTransformer2DModel has none.*diffpress\.load\(ARTIFACT\)"):
        diffpress.compile(pipeline if whole else pipeline.transformer)


def test_what_has_no_denoiser_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"with a denoiser.* got \w*Path"):
        diffpress.compile(Path("out"))


def test_calls_are_recorded_on_a_gpu_as_a_whole_only(artifact: Path) -> None:
    pipeline = diffpress.load(artifact)
    with pytest.raises(UnsupportedModelError, match=r"DiTTransformer2DModel: it lies on cpu. Move it to a GPU first"):
        diffpress.record_graphs(pipeline)
    add_hook_to_module(pipeline.transformer.proj_out_2, ModelHook())
    with pytest.raises(UnsupportedModelError, match="moved between devices while it runs"):
        diffpress.record_graphs(pipeline.transformer)
    with pytest.raises(UnsupportedModelError, match=r"diffpress.record_graphs takes a pipeline .* and got str"):
        diffpress.record_graphs("zoo:digits")
    pipeline.transformer.plan = RuntimePart(StepClock(STEPS))
    with pytest.raises(UnsupportedModelError, match="computes other parts at other steps"):
        diffpress.record_graphs(pipeline)
