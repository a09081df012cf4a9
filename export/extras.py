"""Packages that only some users have: the one place that imports them."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import UserError

ONNX = ("onnx", "onnxruntime", "onnxscript")
"""What writing and checking a graph needs."""


def import_extra(package: str, extra: str = "onnx") -> Any:
    """The module of this name. Raises UserError naming the extra that brings it where it is not installed."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        # What is missing inside of a package that is there is a fault of that package.
        if error.name is None or not f"{package}.".startswith(f"{error.name}."):
            raise
        name = package.partition(".")[0]
        raise UserError(f"This needs {name}, which is not installed: pip install 'diffpress[{extra}]'.") from error
