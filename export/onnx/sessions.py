"""onnxruntime sessions as this project makes them, and which kernels really ran in one."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArtifactError, UserError

Array = NDArray[Any]
INTEGER_KERNELS = frozenset(
    {"DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearConv", "QLinearMatMul"}
)
FLOAT_KERNELS = frozenset({"Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "MatMulNBits"})
DISABLED = ["MatMulAddFusion"]
"""It turns an int8 MatMul with bias back into a float one."""


@dataclass(frozen=True)
class Kernel:
    """One kernel that ran: the operator onnxruntime settled on, the node's name, and its time."""

    operator: str
    node: str
    microseconds: int


def open_session(graph: Path, threads: int = 0, profile: Path | None = None) -> Any:
    """A CPU session of one ONNX file; 0 threads leaves the number to onnxruntime. `profile` collects one trace there.

    Raises ArtifactError where onnxruntime refuses the graph, UserError where onnxruntime is not installed.
    """
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    # 3: errors only. The warnings are about initializers that its own passes no longer need.
    options.log_severity_level = 3
    # 1: float32. Left alone, products with weights in few bits also round their input to 8 bits.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.enable_profiling = profile is not None
    if profile is not None:
        options.profile_file_prefix = str(profile / "trace")
    try:
        return runtime.InferenceSession(
            str(graph), options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED
        )
    except Exception as error:  # onnxruntime's errors share no base class but Exception
        raise ArtifactError(
            f"{graph}: onnxruntime {runtime.__version__} cannot load it ({error}). Export again."
        ) from error


def run_session(session: Any, inputs: Mapping[str, Array]) -> Array:
    """The only output of a session, in float32."""
    return np.asarray(session.run(None, dict(inputs))[0], dtype=np.float32)


def kernels_of(graph: Path, inputs: Mapping[str, Array], threads: int = 1) -> list[Kernel]:
    """Every kernel of one warm run of a graph, read back from onnxruntime's own trace."""
    with TemporaryDirectory() as folder:
        session = open_session(graph, threads, Path(folder))
        run_session(session, inputs)
        run_session(session, inputs)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    found = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    kernels = [
        Kernel(event["args"]["op_name"], event["name"].removesuffix("_kernel_time"), event["dur"]) for event in found
    ]
    return kernels[len(kernels) // 2 :]


def integer_share(kernels: list[Kernel]) -> float:
    """Share of integer kernels among all matrix products and convolutions that ran."""
    integer = sum(kernel.operator in INTEGER_KERNELS for kernel in kernels)
    floating = sum(kernel.operator in FLOAT_KERNELS for kernel in kernels)
    return integer / max(integer + floating, 1)


def _onnxruntime() -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise UserError("Running an export needs onnxruntime: pip install 'diffpress[onnx]'.") from error
