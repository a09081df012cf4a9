"""DeepCache's own package, with its uniform schedule (Ma, Fang, Wang 2024, arXiv 2312.00858)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from DeepCache import DeepCacheSDHelper
from measure import Run, load
from task import Request


def accelerate(row: str, folder: Path, settings: dict[str, Any], request: Request) -> Run:
    """Everything below the skip connection `branch` is computed in one of `interval` steps."""
    pipeline = load(folder)
    helper = DeepCacheSDHelper(pipe=pipeline)
    helper.set_params(cache_interval=settings["interval"], cache_branch_id=settings["branch"])
    helper.enable()
    return Run(pipeline, request.sampling)
