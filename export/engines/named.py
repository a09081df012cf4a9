"""Engines by the name that a user gives."""

from __future__ import annotations

from ..errors import UserError
from .engine import Engine

NAMES = ("onnx", "openvino", "openvino:DEVICE")
"""onnxruntime on the processor; OpenVINO there, or on another device that it finds, such as `openvino:GPU`."""


def engine_named(name: str) -> Engine:
    """The engine of this name; nothing of it is imported before. Raises UserError where we have none."""
    library, colon, device = name.partition(":")
    if name == "onnx":
        from .onnxruntime import ONNXRUNTIME

        return ONNXRUNTIME
    if library == "openvino" and (device or not colon):
        from .openvino import CPU, OpenVino

        return OpenVino(device.upper() or CPU)
    raise UserError(f"--engine {name}: exports run with {', '.join(NAMES)}.")
