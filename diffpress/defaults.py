"""What a pipeline was made for."""

from __future__ import annotations

from diffpress.calibration.sampling import Sampling
from diffpress.export.artifact import is_artifact
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import read_manifest


def default_sampling(folder: PipelineFolder) -> Sampling:
    """What an artifact was made for; the pipeline's own defaults for anything else."""
    if not is_artifact(folder.path):
        return Sampling()
    return Sampling(**read_manifest(folder.path).recipe["sampling"])
