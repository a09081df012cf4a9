"""Open what the user names, in the way it wants to be opened."""

from __future__ import annotations

from typing import Any

import torch

from diffpress.calibration.sampling import Sampling
from diffpress.export.artifact import is_artifact, load_pipeline
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import check_files, read_manifest


def open_pipeline(folder: PipelineFolder, dtype: torch.dtype = torch.float32) -> Any:
    """The running pipeline; of an artifact only after every digest has matched, of others after every weight was read."""
    if is_artifact(folder.path):
        check_files(folder.path, read_manifest(folder.path).files)
    else:
        folder.check()
    return load_pipeline(folder, dtype)


def default_sampling(folder: PipelineFolder) -> Sampling:
    """What an artifact was made for; the pipeline's own defaults for anything else."""
    if not is_artifact(folder.path):
        return Sampling()
    return Sampling(**read_manifest(folder.path).recipe["sampling"])
