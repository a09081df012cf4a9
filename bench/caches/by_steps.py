"""Nothing but fewer steps: what every cache has to beat."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import Run, load
from task import Request


def accelerate(row: str, folder: Path, settings: dict[str, Any], request: Request) -> Run:
    """The plain pipeline in `settings["steps"]` steps."""
    return Run(load(folder), replace(request.sampling, steps=settings["steps"]))
