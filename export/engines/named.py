"""Engines by the name that a user gives."""

from __future__ import annotations

from ..errors import UserError
from .engine import Engine, Form

NAMES = ("onnx", "openvino", "openvino:DEVICE")
"""onnxruntime on the processor; OpenVINO there, or on another device that it finds, such as `openvino:GPU`."""


def engine_named(name: str, form: Form = "uint8 x uint8") -> Engine:
    """The engine of this name, for graphs in a form; nothing of it is imported before. Raises UserError where we have none."""
    library, colon, device = name.partition(":")
    if name == "onnx":
        from .onnxruntime import FOLDED, ONNXRUNTIME

        return FOLDED if form == FOLDED.form else ONNXRUNTIME
    if library == "openvino" and (device or not colon):
        from .openvino import CPU, OpenVino

        return OpenVino(device.upper() or CPU)
    raise UserError(f"--engine {name}: exports run with {', '.join(NAMES)}.")
