"""TensorRT-RTX engines, built ahead of time on a machine that needs no GPU."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import ArtifactError, UserError
from ..extras import import_extra

TARGETS = {"sm_75": "SM75", "sm_80": "SM80", "sm_86": "SM86", "sm_89": "SM89", "sm_120": "SM120", "sm_121": "SM121"}
"""Compute capabilities that it builds for; Hopper and data centres' Blackwell are not among them."""
BATCHES = (1, 2, 8)
"""The fewest, the usual and the most rows of a call; guidance doubles images."""
ADVICE = {
    "HW-specific datatypes: fp8": "float8 needs sm_89 or newer: leave older ones out of --target, or compress to integers",
    "FP32 GEMM is not supported": "Turing has no products in float32: leave sm_75 out of --target",
    "emory": "close other programs, or build fewer of --target at a time",
    "No importer registered": "the graph has an operator that TensorRT lacks: report this model, and use --to onnx",
    "zero point": "it takes symmetric integers alone: report this model, and use --to onnx",
    "imension": "a shape does not fit: report this model, and use --to onnx",
    "shape": "a shape does not fit: report this model, and use --to onnx",
}
"""What to do, by words of the builder's first error."""


class Built(NamedTuple):
    """One engine."""

    file: str
    layers: dict[str, int]
    """How many computing layers have inputs, or weights, of which type."""


def version() -> str:
    """Of the package. Raises UserError where it is not installed."""
    return str(import_extra("tensorrt_rtx", "tensorrt").__version__)


def check_targets(targets: Sequence[str]) -> None:
    """Raises UserError where one is unknown, or there are none."""
    unknown = [name for name in targets if name not in TARGETS]
    if unknown or not targets:
        raise UserError(
            f"--target {','.join(unknown)}: TensorRT-RTX builds for {', '.join(TARGETS)}, several with commas between."
        )


def build_engine(graph: Path, targets: Sequence[str]) -> Built:
    """Build the engine of a graph beside it, for several targets in one file.

    Raises ArtifactError with advice where the builder gives up or crashes.
    """
    out = graph.with_suffix(".engine")
    wanted = ",".join(TARGETS[name] for name in targets)
    command = [sys.executable, "-m", f"{__package__}.tensorrt_build", *map(str, (graph, out)), wanted]
    done = subprocess.run([*command, ",".join(map(str, BATCHES))], capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise ArtifactError(
            f"{graph.name}: TensorRT-RTX {version()} crashed ({signal.Signals(-done.returncode).name}). "
            f"{'There may be too little memory: ' if -done.returncode == signal.SIGKILL else ''}Use --to onnx, or report it."
        )
    if done.returncode:
        raise ArtifactError(f"{graph.name}: TensorRT-RTX could not be asked: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if "errors" in found:
        reason = next(iter(found["errors"]), "it does not say why")
        raise ArtifactError(f"{graph.name}: TensorRT-RTX {version()} builds no engine ({reason}): {advice_on(reason)}.")
    return Built(out.name, found["layers"])


def advice_on(reason: str) -> str:
    """What to do about an error of the builder."""
    return next((advice for words, advice in ADVICE.items() if words in reason), "report this model, and use --to onnx")
