"""Whether the engines of exports are exact on this machine."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from diffpress.export.engines.engine import Engine
from diffpress.export.extras import ONNX


def examine_onnxruntime() -> dict[str, str]:
    """A finding for every kind of layer. Raises ImportError where a package is missing."""
    _require("onnxruntime")
    from diffpress.export.engines.onnxruntime import ONNXRUNTIME

    return _kinds(ONNXRUNTIME, "onnxruntime")


def examine_openvino() -> dict[str, str]:
    """The same for every device, and what each computes in integers."""
    _require("openvino")
    from diffpress.export.engines.openvino import OpenVino, devices

    found: dict[str, str] = {}
    for device in devices():
        engine, name = OpenVino(device), f"openvino on {device}"
        found |= _kinds(engine, name) | {name: engine.exact_products().words()}
    return found


ENGINES: dict[str, Callable[[], dict[str, str]]] = {
    "onnxruntime": examine_onnxruntime,
    "openvino": examine_openvino,
}
"""By name; each imports its own."""


def _require(library: str) -> None:
    for package in (*ONNX, library):
        if find_spec(package) is None:
            raise ModuleNotFoundError(name=package)


def _kinds(engine: Engine, name: str) -> dict[str, str]:
    from diffpress.export.engines.worst_case import findings
    from diffpress.export.onnx.worst_case import write_worst_case

    with TemporaryDirectory() as folder:
        graph = Path(folder) / write_worst_case(Path(folder), engine.form)
        return {
            f"{kind} in {name}": "works" if wrong is None else f"fails: {wrong}"
            for kind, wrong in findings(engine, graph).items()
        }
