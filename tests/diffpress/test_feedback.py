"""Feedback the whole way: recipe, artifact, plain diffusers; alone and on integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from diffpress.calibration.conditions import Condition
from diffpress.calibration.sampling import Sampling, sample
from diffpress.flow import compress_by_name
from diffpress.recipe import parse_recipe

RECIPE: dict[str, Any] = {
    "sampling": {"steps": 4},
    "record": {"trajectories": 4, "batch": 2},
    "steps": {
        "method": "feedback",
        "speedup": 1.5,
        "trials": 1,
        "iterations": 2,
        "batch": 1,
        "validation_images": 1,
    },
}
INTEGERS = {"quantize": {"method": "ptq", "weights": 8, "activations": 8}}


@pytest.mark.filterwarnings("error:.*an autograd kernel was not registered.*")
@pytest.mark.parametrize("more", [{}, INTEGERS], ids=["alone", "on integers"])
def test_an_artifact_with_feedback_draws_with_plain_diffusers(
    tiny_class: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    artifact = compress_by_name(str(tiny_class), parse_recipe({**RECIPE, **more}), tmp_path / "out")
    (row,) = (row for row in artifact.manifest.plan if row.module == "feedback")
    assert row.format.startswith("step plan")
    macs = artifact.cost["macs_per_image"]
    assert macs["candidate"] < macs["reference"]
    pipeline = DiffusionPipeline.from_pretrained(artifact.path)
    pipeline.set_progress_bar_config(disable=True)
    for steps in (4, 7):
        made = sample(pipeline, [Condition("3", 1), Condition("4", 2)], Sampling(steps, 3.0)).images
        assert torch.isfinite(made).all()
    expected = sample(artifact.load(), [Condition("3", 1)], Sampling(4, 3.0)).latents
    assert torch.equal(sample(pipeline, [Condition("3", 1)], Sampling(4, 3.0)).latents, expected)
