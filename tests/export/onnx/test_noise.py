"""Exports of pipelines whose schedulers draw noise or clip: the same images as torch's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from diffpress.export.artifact import load_pipeline
from diffpress.export.engines.onnxruntime import ONNXRUNTIME
from diffpress.export.errors import ArtifactError, UnsupportedModelError, UserError
from diffpress.export.folder import PipelineFolder
from diffpress.export.onnx.export import export_onnx
from diffpress.export.onnx.selftest import FLOAT_LIMIT
from diffpress.export.portable.manifest import EXPORT, UPDATED, read_export
from diffpress.export.portable.pipeline import PortablePipeline

SEEDS = [11, 2**32 + 5]


@pytest.fixture(scope="module")
def with_scheduler(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PipelineFolder]:
    """A function: a pipeline with another scheduler, of another class where one is given."""

    def make(source: Path, scheduler: Any, pipeline_class: Any = diffusers.DiffusionPipeline, **parts: Any) -> Any:
        pipeline = pipeline_class.from_pretrained(source, scheduler=scheduler, **parts)
        folder = tmp_path_factory.mktemp("scheduled") / "pipeline"
        pipeline.save_pretrained(folder)
        return PipelineFolder(folder, "x")

    return make


def check(source: PipelineFolder, out: Path, condition: str, steps: int, **arguments: Any) -> None:
    """Two images in one batch, each with its own generator, equal torch's."""
    manifest = export_onnx(source, out, steps=steps)
    assert manifest.schema_version == UPDATED
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    pipeline = load_pipeline(source)
    expected = pipeline(**arguments, num_inference_steps=steps, generator=generators, output_type="np").images
    found = PortablePipeline(out, ONNXRUNTIME, threads=1).generate_batch([condition] * 2, SEEDS)
    np.testing.assert_allclose(found, expected, atol=FLOAT_LIMIT)
    assert np.abs(expected[0] - expected[1]).max() > 10 * FLOAT_LIMIT


def test_ddpm(one_block: Path, with_scheduler: Callable[..., Any], tmp_path: Path) -> None:
    source = with_scheduler(one_block, diffusers.DDPMScheduler(), diffusers.DDPMPipeline)
    check(source, tmp_path / "out", "", 6, batch_size=2)
    manifest = read_export(tmp_path / "out")
    assert manifest.schedules[6].updates is not None
    file = tmp_path / "out" / EXPORT
    broken = file.read_text(encoding="utf-8").replace('"updates": [\n', '"updates": [\n[],\n', 1)
    file.write_text(broken, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"the updates of \d+ steps in export.json do not fit"):
        read_export(tmp_path / "out")


@pytest.mark.long
@pytest.mark.parametrize(
    "scheduler",
    [diffusers.LCMScheduler(), diffusers.EulerAncestralDiscreteScheduler()],
    ids=["lcm", "euler-ancestral"],
)
def test_prompts(scheduler: Any, one_block_text: Path, with_scheduler: Callable[..., Any], tmp_path: Path) -> None:
    source = with_scheduler(one_block_text, scheduler)
    check(source, tmp_path / "out", "red car", 4, prompt=["red car"] * 2)


@pytest.mark.long
def test_a_consistency_model_with_its_guidance_fixed(
    one_block_text: Path, with_scheduler: Callable[..., Any], tmp_path: Path
) -> None:
    torch.manual_seed(5)
    plain = load_pipeline(PipelineFolder(one_block_text, "x")).unet
    unet = diffusers.UNet2DConditionModel.from_config({**plain.config, "time_cond_proj_dim": 16})
    parts = {"unet": unet, "feature_extractor": None, "safety_checker": None, "image_encoder": None}
    source = with_scheduler(one_block_text, diffusers.LCMScheduler(), diffusers.LatentConsistencyModelPipeline, **parts)
    check(source, tmp_path / "out", "red car", 4, prompt=["red car"] * 2)
    pipeline = PortablePipeline(tmp_path / "out", ONNXRUNTIME, threads=1)
    assert pipeline.manifest.guidance_scale == 8.5
    pipeline.generate("red car", guidance_scale=8.5)
    with pytest.raises(UserError, match=r"exported for a guidance scale of 8.5. Leave"):
        pipeline.generate("red car", guidance_scale=2.0)


def test_noise_that_no_generator_draws_is_refused(
    tiny_class: Path, with_scheduler: Callable[..., Any], tmp_path: Path
) -> None:
    source = with_scheduler(tiny_class, diffusers.DDPMScheduler())
    with pytest.raises(UnsupportedModelError, match="DDPMScheduler draws noise, and from no generator"):
        export_onnx(source, tmp_path / "out", steps=4)
    assert not (tmp_path / "out").exists()
