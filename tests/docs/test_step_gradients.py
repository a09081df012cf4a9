"""What docs/step-gradients.md shows, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import diffpress

DOC = Path(__file__).parents[2] / "docs" / "step-gradients.md"
REWARD, GATE = re.findall(r"^```python\n(.*?)^```$", DOC.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_examples_learn(tiny_text: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_text, torch_dtype=torch.float32)
    shown: dict[str, Any] = {"diffpress": diffpress, "pipeline": pipeline, "reward": lambda latents: latents.mean()}
    exec(REWARD, shown)
    assert all(parameter.grad is not None for parameter in pipeline.unet.parameters())
    pipeline.unet.zero_grad()
    exec(GATE, shown)
    assert shown["losses"][-1] < shown["losses"][0] / 2
    assert all(parameter.grad is None for parameter in pipeline.unet.parameters())


def test_it_is_imported_when_it_is_asked_for() -> None:
    assert "checkpoint_steps" in diffpress.__all__
    assert diffpress.checkpoint_steps.__module__ == "diffpress.calibration.checkpointing"
