"""Whether an export folder is what was written, loads, and still gives the image that torch gave."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import ArtifactError
from .manifest import ExportManifest
from .run import OnnxPipeline


def verify_export(path: Path, threads: int = 0) -> ExportManifest:
    """Check every digest, load every graph and run the self test; returns the manifest.

    Raises ArtifactError at the first thing that is not as it was exported.
    """
    pipeline = OnnxPipeline(path, threads)
    test = pipeline.manifest.self_test
    error = self_test_error(pipeline, path)
    # Written so that NaN fails too.
    if not error <= test.tolerance:
        raise ArtifactError(
            f"{path}: the self test differs from torch's image by {error:.2g} (root mean square), allowed is "
            f"{test.tolerance:.2g}. Export again on this machine, or report it with `diffpress doctor`."
        )
    return pipeline.manifest


def self_test_error(pipeline: OnnxPipeline, path: Path) -> float:
    """Root mean square difference between the self test's image and what this machine makes of it."""
    test = pipeline.manifest.self_test
    try:
        expected = np.load(path / test.image, allow_pickle=False)
    except ValueError as error:
        raise ArtifactError(f"{path}: {test.image} is no image array ({error}). Export again.") from error
    image = pipeline.generate(test.condition, test.seed, test.steps, test.guidance_scale)
    if image.shape != expected.shape:
        raise ArtifactError(f"{path}: the self test gives an image of {image.shape}, expected was {expected.shape}.")
    return float(np.sqrt(np.mean((image - expected) ** 2)))
