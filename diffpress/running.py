"""One output from whatever can make one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffpress.export.bundle.read import is_bundle, opened_bundle
from diffpress.export.engines.named import NAMES, engine_named
from diffpress.export.errors import UserError
from diffpress.export.portable.manifest import is_export, read_export

from .calling import NO_OPTIONS, Options
from .recipe import SamplingSection
from .writing import Made, check_ending, to_picture

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffpress.calibration.calls import Takes
    from diffpress.export.engines.engine import Engine
    from diffpress.export.folder import PipelineFolder
    from diffpress.export.portable.pipeline import PortablePipeline

TORCH = "torch"


@dataclass(frozen=True)
class Wanted:
    """What one image is asked for; None leaves the default."""

    prompt: str | None
    label: int | None
    seed: int
    steps: int | None
    guidance: float | None
    options: Options = NO_OPTIONS

    def sampling(self) -> SamplingSection:
        """Steps and guidance, those of --set where there are no others."""
        own = {"steps": self.steps, "guidance_scale": self.guidance}
        return self.options.sampling.model_copy(
            update={name: value for name, value in own.items() if value is not None}
        )

    def text(self, model: str, takes: Takes) -> str:
        """The prompt, or the class as text. Raises UserError where `model` takes something else."""
        if self.prompt is not None and takes != "prompt":
            instead = "leave it out" if takes == "nothing" else "give --label NUMBER"
            raise UserError(f"{model} does not draw prompts: {instead} instead of --prompt {self.prompt!r}.")
        if self.label is not None and takes != "label":
            instead = "leave it out" if takes == "nothing" else "give --prompt TEXT"
            raise UserError(f"{model} does not draw classes: {instead} instead of --label {self.label}.")
        if takes == "label" and self.label is None:
            raise UserError(f"{model} draws classes: give --label NUMBER.")
        return str(self.label) if takes == "label" else self.prompt or ""


def wanted_engine(model: str, asked: str | None) -> str:
    """The engine asked for, or `onnx` for an export or a bundle and `torch` for a pipeline.

    Raises UserError where `model` does not run in it.
    """
    if not is_export(Path(model)) and not is_bundle(Path(model)):
        if asked not in (None, TORCH):
            raise UserError(
                f"{model} runs with --engine torch, not {asked}. Export it first: diffpress export MODEL --to onnx --out DIR."
            )
        return TORCH
    if asked == TORCH:
        raise UserError(f"{model} is an export: it runs with --engine {', '.join(NAMES)}, not torch.")
    return asked or NAMES[0]


def run_torch(folder: PipelineFolder, wanted: Wanted, out: Path | None = None) -> Made:
    """Sample a pipeline or artifact. Raises UserError, if it can before any weight is read, also where what it makes cannot
    be written to `out`.
    """
    from diffpress.calibration.arguments import rate_of
    from diffpress.calibration.calls import output_kind
    from diffpress.calibration.conditions import Condition, check_text, kind
    from diffpress.calibration.sampling import Sampling, sample
    from diffpress.export.artifact import open_pipeline

    from .defaults import check_sampling, default_sampling
    from .models import pipeline_class
    from .precision import working_dtype

    own_class = pipeline_class(folder)
    if out is not None:
        check_ending(out, output_kind(own_class))
    text, asked, made_for = wanted.text(folder.name, kind(own_class)), wanted.sampling(), default_sampling(folder)
    check_sampling(folder, Sampling(asked.steps, asked.guidance_scale))
    given = wanted.options.given(own_class, made_for.call, drawn=False)
    pipeline = open_pipeline(folder, working_dtype(folder), prefer="speed")
    check_text(pipeline, text)
    guidance = made_for.guidance_scale if asked.guidance_scale is None else asked.guidance_scale
    sampling = Sampling(asked.steps or made_for.steps, guidance, given.shared)
    made = sample(pipeline, [Condition(text, wanted.seed)], sampling)
    return Made(made.kind, made.images[0], rate_of(pipeline))


def run_export(path: Path, engine: str, wanted: Wanted) -> Image:
    """Run an export or a bundle, without torch."""
    wanted.options.refuse(str(path))
    if not is_bundle(path):
        return _run_export(path, str(path), engine, wanted)
    with opened_bundle(path) as (_, folder):
        return _run_export(folder, str(path), engine, wanted)


def _run_export(folder: Path, name: str, engine: str, wanted: Wanted) -> Image:
    pipeline = open_export(folder, engine_named(engine, read_export(folder).form))
    manifest = pipeline.manifest
    text = wanted.text(name, "prompt" if manifest.tokens else "label" if manifest.labels else "nothing")
    asked = wanted.sampling()
    return to_picture(pipeline.generate(text, wanted.seed, asked.steps, asked.guidance_scale))


def open_export(folder: Path, engine: Engine) -> PortablePipeline:
    """An export in an engine. Raises ArtifactError where its products of codes are not exact there."""
    from diffpress.export.engines.worst_case import require_exact
    from diffpress.export.portable.pipeline import PortablePipeline

    pipeline = PortablePipeline(folder, engine)
    if pipeline.manifest.worst_case is not None:
        require_exact(engine, folder / pipeline.manifest.worst_case)
    return pipeline
