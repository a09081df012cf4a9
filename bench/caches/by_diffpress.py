"""Our own rows: a step plan, alone and with eight bits, as `compress` makes them and `load` runs them."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from measure import Run
from task import Request

import diffpress
from diffpress.calibration.conditions import call_parameters
from diffpress.models import pipeline_class, resolve

EIGHT_BITS = {"method": "ptq", "weights": 8, "activations": 8, "float_activations": 0.05}
"""As in the preset `balanced`."""


def accelerate(row: str, folder: Path, settings: dict[str, Any], request: Request) -> Run:
    """Compress for the steps that are asked for, and load."""
    sampling: dict[str, Any] = {"steps": request.sampling.steps}
    if "guidance_scale" in call_parameters(pipeline_class(resolve(str(folder)))):
        sampling["guidance_scale"] = request.sampling.guidance_scale
    recipe: dict[str, Any] = {
        "sampling": sampling,
        "steps": {"method": "inherit", "speedup": settings["speedup"]},
    }
    if row == "inherit+W8A8":
        recipe["quantize"] = EIGHT_BITS
    with TemporaryDirectory() as work:
        diffpress.compress(str(folder), recipe, Path(work) / "out")
        pipeline: Any = diffpress.load(Path(work) / "out")
    pipeline.set_progress_bar_config(disable=True)
    return Run(pipeline, request.sampling)
