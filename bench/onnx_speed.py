"""Integer against float denoisers in onnxruntime: `python bench/onnx_speed.py zoo:emoji out/emoji --json`.

Calls alternate in one process, so that other load meets both; the ratio is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime
import torch

from diffpress.export.engines.engine import Array, Session
from diffpress.export.engines.onnxruntime import ONNXRUNTIME, Kernel, integer_share, kernels_of
from diffpress.export.onnx.export import export_onnx
from diffpress.export.portable.manifest import ExportManifest, Port
from diffpress.models import resolve

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine

WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="the float pipeline: a folder, zoo:NAME or a hub id")
    parser.add_argument("artifact", help="the artifact made of it")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[2, 8], help="rows of one call; guidance doubles images"
    )
    parser.add_argument("--calls", type=int, default=30, help="pairs of calls a batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with TemporaryDirectory() as folder:
        graphs = [Path(folder) / name / "denoiser.onnx" for name in ("float", "integer")]
        pairs = zip((arguments.model, arguments.artifact), graphs, strict=True)
        manifests = [export_onnx(resolve(model), graph.parent) for model, graph in pairs]
        rows = [measure(graphs, manifests[0], size, arguments.calls, arguments.threads) for size in arguments.batch]
        kernels = kernels_of(graphs[1], inputs_of(manifests[0], arguments.batch[-1]), arguments.threads)
    found: dict[str, Any] = {
        "machine": {**machine(), "onnxruntime": onnxruntime.__version__},
        "model": arguments.model,
        "artifact": arguments.artifact,
        "rows": rows,
        "integer_kernel_share": integer_share(kernels),
        "microseconds_by_kernel": by_operator(kernels),
        "largest_error": [manifest.largest_error for manifest in manifests],
    }
    print(json.dumps(found, indent=1) if arguments.json else words(found))


def measure(
    graphs: Sequence[Path], manifest: ExportManifest, batch: int, calls: int, threads: int
) -> dict[str, int | float]:
    """Milliseconds of both denoisers at one batch size, and how they compare pair by pair."""
    sessions, inputs = [ONNXRUNTIME.open(graph, threads) for graph in graphs], inputs_of(manifest, batch)
    pairs = [[_milliseconds(session, inputs) for session in sessions] for _ in range(WARM_UP + calls)][WARM_UP:]
    return {
        "batch": batch,
        "float_ms": statistics.median(pair[0] for pair in pairs),
        "integer_ms": statistics.median(pair[1] for pair in pairs),
        "integer_over_float": statistics.median(pair[1] / pair[0] for pair in pairs),
    }


def inputs_of(manifest: ExportManifest, batch: int) -> dict[str, Array]:
    """Random inputs of the denoiser, at a time step that it knows."""
    generator = np.random.default_rng(0)
    timesteps = manifest.schedules[manifest.steps].timesteps

    def value(port: Port) -> Array:
        if port.name == "timestep":
            return np.array([timesteps[len(timesteps) // 2]], np.float32)
        shape = [batch if size == "batch" else int(size) for size in port.shape]
        return np.zeros(shape, np.int64) if port.dtype == "int64" else generator.standard_normal(shape, np.float32)

    return {port.name: value(port) for port in manifest.components["denoiser"].inputs}


def by_operator(kernels: Sequence[Kernel]) -> dict[str, int]:
    """Time of one call, summed over the kernels of each operator."""
    times: Counter[str] = Counter()
    for kernel in kernels:
        times[kernel.operator] += kernel.microseconds
    return dict(times.most_common())


def words(found: dict[str, Any]) -> str:
    lines = [
        f"batch {row['batch']:3}: float {row['float_ms']:8.2f} ms, integer {row['integer_ms']:8.2f} ms, "
        f"ratio {row['integer_over_float']:.2f}"
        for row in found["rows"]
    ]
    return "\n".join([*lines, f"integer kernels: {found['integer_kernel_share']:.0%}", f"{found['machine']}"])


def _milliseconds(session: Session, inputs: dict[str, Array]) -> float:
    start = perf_counter()
    session.run(inputs)
    return 1e3 * (perf_counter() - start)


if __name__ == "__main__":
    main()
