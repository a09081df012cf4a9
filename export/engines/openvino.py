"""OpenVINO on any device that it finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, UserError
from .engine import Array, Form, Kernels
from .openvino_dequantize import dequantize_extension
from .openvino_library import library
from .openvino_products import ExactProducts, exact_products, rewrite_products_

CPU = "CPU"
PRODUCTS = frozenset({"Convolution", "FullyConnected", "MatMul"})
"""What the layers are called in which a compiled model multiplies."""

INTEGERS = ("i8", "u8")
"""How kernels in integers end; what a layer is called says less, since it may name the type of its weights alone."""
PRECISION, FLOAT32 = "INFERENCE_PRECISION_HINT", "f32"
"""Left alone, it rounds to bfloat16 where a processor has it."""


class OpenVinoSession:
    """A compiled model."""

    def __init__(self, compiled: Any) -> None:
        self.compiled, self.request = compiled, compiled.create_infer_request()
        self.names = [output.any_name for output in compiled.outputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        # OpenVINO does not look at shapes before it writes.
        for name, value in inputs.items():
            shape = self.compiled.input(name).get_partial_shape()
            if not shape.compatible(library().PartialShape(list(value.shape))):
                raise ValueError(f"the input {name} is {list(value.shape)}, the graph takes {shape}")
        results = self.request.infer(dict(inputs))
        # The request's own memory is overwritten by its next run.
        return {name: results[place].copy() for place, name in enumerate(self.names)}


class OpenVino:
    """OpenVINO, which reads the graphs that onnxruntime runs, and is given their products in a form that is exact there."""

    form: Form = "uint8 x uint8"

    def __init__(self, device: str = CPU) -> None:
        self.device = device
        self.name = "openvino" if device == CPU else f"openvino:{device}"

    @property
    def settings(self) -> dict[str, str]:
        return {PRECISION: FLOAT32}

    def version(self) -> str:
        return str(library().__version__).partition("-")[0]

    def open(self, graph: Path, threads: int = 0) -> OpenVinoSession:
        self._check_device()
        try:
            model = _core().read_model(graph)
            rewrite_products_(model, self.exact_products())
            return _compiled(model, self.device, threads)
        except RuntimeError as error:
            reason = _reason(error)
            raise ArtifactError(
                f"{graph}: {self.name} {self.version()} cannot load it ({reason}). Use --engine onnx, or export again."
            ) from error

    def kernels(self, graph: Path, inputs: Mapping[str, Array], threads: int = 0) -> Kernels:
        session = self.open(graph, threads)
        # Kernels are chosen for the shapes of a run.
        session.run(inputs)
        # What is said of a layer lives as long as it does.
        layers = session.compiled.get_runtime_model().get_ops()
        ran = Counter(_said(layer, "primitiveType") for layer in layers if _said(layer, "layerType") in PRODUCTS)
        integer = sum(count for name, count in ran.items() if name.lower().endswith(INTEGERS))
        return Kernels(integer, ran.total() - integer, dict(sorted(ran.items())))

    def exact_products(self) -> ExactProducts:
        """Which products this device computes in integers. Raises UserError where there is no such device."""
        self._check_device()
        return _exact_products(self.device)

    def _check_device(self) -> None:
        found = devices()
        if self.device not in found:
            raise UserError(
                f"--engine {self.name}: OpenVINO finds {', '.join(found)} on this machine. Name one of them."
            )


def devices() -> list[str]:
    """What OpenVINO finds here. Raises UserError where it is not installed."""
    return list(_core().available_devices)


@cache
def _exact_products(device: str) -> ExactProducts:
    return exact_products(lambda model, x: next(iter(_compiled(model, device, 1).run({"x": x}).values())))


def _compiled(model: Any, device: str, threads: int) -> OpenVinoSession:
    settings: dict[str, Any] = {PRECISION: FLOAT32}
    if threads and device == CPU:
        settings["INFERENCE_NUM_THREADS"] = threads
    return OpenVinoSession(_core().compile_model(model, device, settings))


@cache
def _core() -> Any:
    core = library().Core()
    core.add_extension(dequantize_extension())
    return core


def _reason(error: RuntimeError) -> str:
    """Of a report of many lines, that before its summary."""
    lines = [line.strip() for line in str(error).partition("Summary:")[0].splitlines() if line.strip()]
    return lines[-1] if lines else "for a reason that it does not say"


def _said(layer: Any, key: str) -> str:
    described = layer.get_rt_info()
    return str(described[key].astype(str)) if key in described else ""
