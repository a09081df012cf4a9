"""One image from whatever can make one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffpress.export.errors import ArtifactError, UserError
from diffpress.export.onnx.manifest import is_export

if TYPE_CHECKING:
    from PIL.Image import Image


def wanted_engine(model: str, asked: str | None) -> str:
    """`onnx` for an export, `torch` for a pipeline. Raises UserError where another engine was asked for."""
    natural = "onnx" if is_export(Path(model)) else "torch"
    if asked is not None and asked != natural:
        hint = "" if natural == "onnx" else " Export it first: diffpress export MODEL --to onnx --out DIR."
        raise UserError(f"{model} runs with --engine {natural}, not {asked}.{hint}")
    return natural


def run_torch(model: str, text: str, seed: int, steps: int | None, guidance: float | None) -> Image:
    """Sample a pipeline or artifact."""
    from diffpress.calibration.conditions import Condition, check_text
    from diffpress.calibration.sampling import Sampling, sample
    from diffpress.export.artifact import open_pipeline

    from .defaults import default_sampling
    from .models import resolve

    folder = resolve(model)
    pipeline = open_pipeline(folder)
    check_text(pipeline, text)
    made_for = default_sampling(folder)
    sampling = Sampling(steps or made_for.steps, guidance if guidance is not None else made_for.guidance_scale)
    return to_picture(sample(pipeline, [Condition(text, seed)], sampling).images[0].permute(1, 2, 0).numpy())


def run_onnx(model: str, text: str, seed: int, steps: int | None, guidance: float | None) -> Image:
    """Run an export, without torch."""
    try:
        from diffpress.export.onnx.run import OnnxPipeline
    except ImportError as error:
        raise ArtifactError(f"running an export needs {error.name}: pip install 'diffpress[onnx]'") from error
    return to_picture(OnnxPipeline(Path(model)).generate(text, seed, steps, guidance))


def to_picture(pixels: np.ndarray) -> Image:
    """Pixels [H, W, C] in 0..1 as an 8-bit image, grey where C is 1."""
    from PIL import Image

    rounded = (pixels * 255).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(rounded[:, :, 0] if rounded.shape[2] == 1 else rounded)
