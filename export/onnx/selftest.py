"""The image by which an export proves itself, here and on every other machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..engines.engine import Engine
from ..errors import ArtifactError
from ..portable.manifest import ExportManifest, SelfTest, write_export
from ..portable.pipeline import PortablePipeline
from ..portable.verify import self_test_error
from .edges import at_edges
from .kinds import Kind, torch_image

IMAGE = "selftest.npy"
SEED = 0
FLOAT_LIMIT = 1 / 4 / 255
"""Root mean square difference of images in 0..1 that float rounding may make: a quarter of an 8-bit level."""


def write_self_test(
    kind: Kind,
    pipeline: Any,
    rounding: Iterable[tuple[nn.Module, Mapping[str, float]]],
    folder: Path,
    steps: int,
    guidance_scale: float | None,
) -> SelfTest:
    """Store the image that torch makes, and how far off another engine's may be, given how its modules agreed.

    Twice what becomes of it where every code at an edge is the other one (see `edges`): engines may choose half of them
    as torch does, and what the others do does not cancel.
    """
    image = torch_image(kind, pipeline, kind.example, SEED, steps, guidance_scale)
    np.save(folder / IMAGE, image.numpy())
    with ExitStack() as stack:
        for module, own in rounding:
            stack.enter_context(at_edges(module, own))
        other = torch_image(kind, pipeline, kind.example, SEED, steps, guidance_scale)
    moved = float((other - image).square().mean().sqrt())
    return SelfTest(
        condition=kind.example,
        seed=SEED,
        steps=steps,
        guidance_scale=guidance_scale,
        image=IMAGE,
        rms_error=0.0,
        tolerance=FLOAT_LIMIT + 2 * moved,
    )


def run_self_test(manifest: ExportManifest, folder: Path, engine: Engine) -> ExportManifest:
    """Make the image with the graphs and write the manifest with its error. Raises ArtifactError where it is not torch's."""
    write_export(folder, manifest)
    pipeline = PortablePipeline(folder, engine, torch.get_num_threads())
    error, limit = self_test_error(pipeline, folder), manifest.self_test.tolerance
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
