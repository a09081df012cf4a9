"""A script that builds the engines of an export on the machine that will run them."""

from __future__ import annotations

from pathlib import Path

from ..engines.tensorrt_rtx import BATCHES
from ..portable.manifest import ExportManifest, Graph

SCRIPT = "build_engines.sh"
HEADER = """#!/bin/sh
# Builds one TensorRT engine a graph, on the GPU that will run them: TensorRT 10 or newer, Jetson Orin with JetPack 6 included.
# TRTEXEC=/usr/src/tensorrt/bin/trtexec where it is not in the PATH. Graphs are strongly typed: no precision is chosen here.
set -eu
cd "$(dirname "$0")"
: "${TRTEXEC:=trtexec}"
"""


def write_script(folder: Path, manifest: ExportManifest) -> str:
    """Write the script to an export; returns its name."""
    path = folder / SCRIPT
    path.write_text(HEADER + "".join(f"{_line(graph)}\n" for graph in manifest.components.values()), encoding="utf-8")
    path.chmod(0o755)
    return SCRIPT


def _line(graph: Graph) -> str:
    engine = graph.file.removesuffix(".onnx") + ".engine"
    shapes = [
        f"--{name}Shapes="
        + ",".join(f"{port.name}:{_sizes(port.shape, batch)}" for port in graph.inputs if "batch" in port.shape)
        for name, batch in zip(("min", "opt", "max"), BATCHES, strict=True)
    ]
    return " ".join(
        ['"$TRTEXEC"', f"--onnx={graph.file}", f"--saveEngine={engine}", "--stronglyTyped", "--skipInference", *shapes]
    )


def _sizes(shape: tuple[int | str, ...], batch: int) -> str:
    return "x".join(str(batch if size == "batch" else size) for size in shape)
