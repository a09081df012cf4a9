"""Small pipelines of families whose modulation reads the time step alone, and of families where something is mixed in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, QwenImagePipeline

from diffpress.calibration.conditions import conditions
from diffpress.calibration.sampling import Sampling, denoiser_of
from diffpress.calibration.trajectory import Trajectories
from diffpress.compress.stage import Subject
from diffpress.export.artifact import load_pipeline
from diffpress.export.folder import PipelineFolder
from diffpress.export.source import forms_of, source_tensors

SAMPLING = Sampling(3)


@pytest.fixture(scope="session")
def small_pipelines() -> Iterator[ModuleType]:
    """The families that are measured by bench/modulation.py as well."""
    bench = str(Path(__file__).parents[3] / "bench")
    sys.path.insert(0, bench)
    import small_pipelines

    with pytest.MonkeyPatch.context() as patch:
        # Of their own they draw 1024 x 1024.
        for pipeline in (FluxPipeline, QwenImagePipeline):
            patch.setattr(pipeline, "default_sample_size", property(lambda _: 8, lambda *_: None), raising=False)
        yield small_pipelines
    sys.path.remove(bench)


@pytest.fixture(scope="session")
def family(small_pipelines: ModuleType, made_once: Callable[..., Path]) -> Callable[[str], Path]:
    """A function: the folder of a small pipeline of that family, in half precision as real ones are stored."""

    def make(name: str) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            torch.manual_seed(0)
            pipeline: DiffusionPipeline = small_pipelines.PIPELINES[name](folder)
            pipeline.to(dtype=torch.float16).save_pretrained(folder)

        return write

    return lambda name: made_once(f"family-{name.replace(' ', '-')}", make(name))


@pytest.fixture(scope="session")
def subject_of() -> Callable[[Path], Subject]:
    """A function: the denoiser of the pipeline in a folder, of which nothing is recorded."""

    def get(folder: Path) -> Subject:
        source = PipelineFolder(folder, folder.name)
        pipeline: Any = load_pipeline(source)
        forms = forms_of(source_tensors(source, source.denoiser))
        return Subject(
            pipeline,
            source.denoiser,
            forms,
            Trajectories(Path()),
            SAMPLING,
            lambda count: conditions(pipeline, "builtin", count, 100),
            2,
            0,
        )

    return get


@pytest.fixture(scope="session")
def denoiser() -> Callable[[Path], torch.nn.Module]:
    """A function: the denoiser of the pipeline in a folder, loaded as a user does."""
    return lambda folder: denoiser_of(DiffusionPipeline.from_pretrained(folder))
