"""One image from whatever can make one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffpress.export.engines.named import NAMES, engine_named
from diffpress.export.errors import UserError
from diffpress.export.portable.manifest import is_export

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffpress.calibration.conditions import Takes
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
    """The engine asked for, or `onnx` for an export and `torch` for a pipeline.

    Raises UserError where `model` does not run in it.
    """
    if not is_export(Path(model)):
        if asked not in (None, TORCH):
            raise UserError(
                f"{model} runs with --engine torch, not {asked}. Export it first: diffpress export MODEL --to onnx --out DIR."
            )
        return TORCH
    if asked == TORCH:
        raise UserError(f"{model} is an export: it runs with --engine {', '.join(NAMES)}, not torch.")
    return asked or NAMES[0]


def run_torch(folder: PipelineFolder, wanted: Wanted) -> Image:
    """Sample a pipeline or artifact. Raises UserError, if it can before any weight is read."""
    from diffpress.calibration.conditions import Condition, check_text, kind
    from diffpress.calibration.sampling import Sampling, sample
    from diffpress.export.artifact import open_pipeline

    from .defaults import check_sampling, default_sampling
    from .models import pipeline_class
    from .precision import working_dtype

    text = wanted.text(folder.name, kind(pipeline_class(folder)))
    check_sampling(folder, Sampling(wanted.steps, wanted.guidance))
    pipeline = open_pipeline(folder, working_dtype(folder), prefer="speed")
    check_text(pipeline, text)
    made_for = default_sampling(folder)
    guidance = made_for.guidance_scale if wanted.guidance is None else wanted.guidance
    made = sample(pipeline, [Condition(text, wanted.seed)], Sampling(wanted.steps or made_for.steps, guidance))
    return to_picture(made.images[0].permute(1, 2, 0).numpy())


def run_export(folder: Path, engine: str, wanted: Wanted) -> Image:
    """Run an export, without torch."""
    pipeline = open_export(folder, engine_named(engine))
    manifest = pipeline.manifest
    text = wanted.text(str(folder), "prompt" if manifest.tokens else "label" if manifest.labels else "nothing")
    return to_picture(pipeline.generate(text, wanted.seed, wanted.steps, wanted.guidance))


def open_export(folder: Path, engine: Engine) -> PortablePipeline:
    """An export in an engine. Raises ArtifactError where its products of codes are not exact there."""
    from diffpress.export.engines.worst_case import require_exact
    from diffpress.export.portable.pipeline import PortablePipeline

    pipeline = PortablePipeline(folder, engine)
    if pipeline.manifest.worst_case is not None:
        require_exact(engine, folder / pipeline.manifest.worst_case)
    return pipeline


def to_picture(pixels: np.ndarray) -> Image:
    """Pixels [H, W, C] in 0..1 as an 8-bit image, grey where C is 1."""
    from PIL import Image

    rounded = (pixels * 255).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(rounded[:, :, 0] if rounded.shape[2] == 1 else rounded)
