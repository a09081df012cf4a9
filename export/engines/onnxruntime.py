"""onnxruntime on the CPU, and which kernels really ran in it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..errors import ArtifactError
from ..extras import import_extra
from .engine import Array, Form, Kernels

INTEGER_KERNELS = frozenset(
    {"DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearConv", "QLinearMatMul"}
)
FLOAT_KERNELS = frozenset({"Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "MatMulNBits"})
DISABLED = ["MatMulAddFusion"]
"""It turns an int8 MatMul with bias back into a float one."""

MATMUL_NBITS, FLOAT32 = "session.qdq_matmulnbits_accuracy_level", "1"
"""Left alone, products with weights in few bits also round their input to 8 bits."""
QDQ = "session.disable_quant_qdq"


@dataclass(frozen=True)
class Kernel:
    """One kernel that ran: the operator onnxruntime settled on, the node's name, and its time."""

    operator: str
    node: str
    microseconds: int


class OnnxRuntimeSession:
    """A session of onnxruntime."""

    def __init__(self, session: Any) -> None:
        self.session, self.names = session, [output.name for output in session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(self.names, map(np.asarray, self.session.run(self.names, dict(inputs))), strict=True))


class OnnxRuntime:
    """The CPU provider of onnxruntime.

    u8 x u8 products are exact on x86 with and without VNNI and on ARM. Speed over u8 x s8 and over floats, products alone,
    one thread of a Zen 3 core (AVX2, no VNNI), onnxruntime 1.32, [M, K] x N: [256, 320] x 320 0.9 and 1.2,
    [1024, 320] x 1280 0.8 and 1.3, [1024, 1280] x 320 0.7 and 1.5; and there u8 x s8 saturates.
    """

    name = "onnxruntime"

    def __init__(self, form: Form = "uint8 x uint8") -> None:
        self.form: Form = form

    @property
    def settings(self) -> dict[str, str]:
        # What is folded is for others: here, a product of codes in floats is exact, and one in integers may not be.
        folded = {QDQ: "1"} if self.form == "int8 folded" else {}
        return {MATMUL_NBITS: FLOAT32, **folded}

    def version(self) -> str:
        return str(import_extra("onnxruntime").__version__)

    def open(self, graph: Path, threads: int = 0) -> OnnxRuntimeSession:
        return OnnxRuntimeSession(_open(graph, threads, self.settings))

    def kernels(self, graph: Path, inputs: Mapping[str, Array], threads: int = 0) -> Kernels:
        ran = Counter(kernel.operator for kernel in kernels_of(graph, inputs, threads, self.settings))
        multiplied = {name: count for name, count in sorted(ran.items()) if name in INTEGER_KERNELS | FLOAT_KERNELS}
        integer = sum(count for name, count in multiplied.items() if name in INTEGER_KERNELS)
        return Kernels(integer, sum(multiplied.values()) - integer, multiplied)


ONNXRUNTIME = OnnxRuntime()
FOLDED = OnnxRuntime("int8 folded")
"""What graphs for TensorRT are checked in."""


def kernels_of(
    graph: Path, inputs: Mapping[str, Array], threads: int = 1, settings: Mapping[str, str] = ONNXRUNTIME.settings
) -> list[Kernel]:
    """Every kernel of one warm run of a graph, read back from onnxruntime's own trace."""
    with TemporaryDirectory() as folder:
        session = _open(graph, threads, settings, Path(folder))
        session.run(None, dict(inputs))
        session.run(None, dict(inputs))
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


def _open(graph: Path, threads: int, settings: Mapping[str, str], profile: Path | None = None) -> Any:
    """onnxruntime's own session; `profile` collects one trace there."""
    runtime = import_extra("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    # 3: errors only. The warnings are about initializers that its own passes no longer need.
    options.log_severity_level = 3
    for name, value in settings.items():
        options.add_session_config_entry(name, value)
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
