"""OpenVINO's own package: the one place that imports it."""

from __future__ import annotations

import sys
from typing import Any

from ..extras import import_extra


def library() -> Any:
    """The package. Raises UserError where it is not installed."""
    # Where it finds this one, it reports to its makers that it was imported.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return import_extra("openvino", "openvino")


def operators() -> Any:
    """Its operators. Raises as `library` does."""
    library()
    return import_extra("openvino.opset15", "openvino")
