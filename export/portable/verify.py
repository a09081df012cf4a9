"""Whether an export folder is what was written, loads, and still gives the image that torch gave."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..engines.engine import Engine
from ..engines.worst_case import require_exact
from ..errors import ArtifactError
from .manifest import ExportManifest
from .pipeline import PortablePipeline


def verify_export(path: Path, engine: Engine, threads: int = 0) -> ExportManifest:
    """Check every digest, the engine's sums on this machine, every graph and the self test; returns the manifest.

    Raises ArtifactError at the first thing that is not as it was exported.
    """
    pipeline = PortablePipeline(path, engine, threads)
    test = pipeline.manifest.self_test
    if pipeline.manifest.worst_case is not None:
        require_exact(engine, path / pipeline.manifest.worst_case)
    error = self_test_error(pipeline, path)
    # Written so that NaN fails too.
    if not error <= test.tolerance:
        raise ArtifactError(
            f"{path}: the self test differs from torch's image by {error:.2g} (root mean square), allowed is "
            f"{test.tolerance:.2g}. Export again on this machine, or report it with `diffpress doctor`."
        )
    return pipeline.manifest


def self_test_error(pipeline: PortablePipeline, path: Path) -> float:
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
