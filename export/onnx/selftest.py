"""The image by which an export proves itself, here and on every other machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import ArtifactError
from .check import jittered
from .kinds import Kind, torch_image
from .manifest import ExportManifest, SelfTest, write_export
from .run import OnnxPipeline
from .verify import self_test_error

IMAGE = "selftest.npy"
SEED = 0
FLOAT_LIMIT = 1e-3
"""Root mean square difference of images in 0..1 that float rounding may make: a quarter of an 8-bit level."""
JITTERS = 2
MARGIN = 4.0
"""How much further than jittered torch another engine or machine may be: images differ in how much they are moved."""


def write_self_test(kind: Kind, pipeline: Any, folder: Path, steps: int, guidance_scale: float | None) -> SelfTest:
    """Store the image that torch makes, with a tolerance from how far rounding alone moves it."""
    image = torch_image(kind, pipeline, kind.example, SEED, steps, guidance_scale)
    np.save(folder / IMAGE, image.numpy())
    models = nn.ModuleList(part for part in pipeline.components.values() if isinstance(part, nn.Module))
    moved = 0.0
    for seed in range(JITTERS):
        with jittered(models, torch.Generator().manual_seed(seed)):
            other = torch_image(kind, pipeline, kind.example, SEED, steps, guidance_scale)
        moved = max(moved, float((other - image).square().mean().sqrt()))
    return SelfTest(
        condition=kind.example,
        seed=SEED,
        steps=steps,
        guidance_scale=guidance_scale,
        image=IMAGE,
        rms_error=0.0,
        tolerance=FLOAT_LIMIT + MARGIN * moved,
    )


def run_self_test(manifest: ExportManifest, folder: Path) -> ExportManifest:
    """Make the image with the graphs and write the manifest with its error. Raises ArtifactError where it is not torch's."""
    write_export(folder, manifest)
    error, limit = self_test_error(OnnxPipeline(folder, torch.get_num_threads()), folder), manifest.self_test.tolerance
    # Written so that NaN fails too.
    if not error <= limit:
        raise ArtifactError(
            f"The exported pipeline's image differs from torch's by {error:.2g} (root mean square), rounding explains "
            f"{limit:.2g}. Nothing was written; report this model with the versions of torch and onnxruntime."
        )
    test = manifest.self_test.model_copy(update={"rms_error": error})
    manifest = manifest.model_copy(update={"self_test": test})
    write_export(folder, manifest)
    return manifest
