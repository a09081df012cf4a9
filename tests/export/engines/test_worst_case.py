"""Sums of products of codes are exact, or the engine is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffpress.export.artifact import load_pipeline, write_pipeline
from diffpress.export.engines.engine import Array, Form, Session
from diffpress.export.engines.onnxruntime import ONNXRUNTIME
from diffpress.export.engines.worst_case import findings, require_exact
from diffpress.export.errors import ArtifactError
from diffpress.export.folder import PipelineFolder
from diffpress.export.onnx.export import export_onnx
from diffpress.export.onnx.worst_case import write_worst_case

FORM: Form = "uint8 x uint8"


def product(path: Path, weights: Array, constant: bool, fused: bool) -> Path:
    """A file with uint8 codes [M, K] times `weights` [K, N], both with zero 128; `fused` with a scale and bias on top."""
    rows, columns = weights.shape
    arrays = {"zero": np.array(128, np.uint8), "scale": np.ones(columns, np.float32)} | (
        {"w": weights} if constant else {}
    )
    inputs = [helper.make_tensor_value_info("x", TensorProto.UINT8, ["m", rows])]
    if not constant:
        inputs.append(helper.make_tensor_value_info("w", TensorProto.UINT8, [rows, columns]))
    nodes = [helper.make_node("MatMulInteger", ["x", "w", "zero", "zero"], ["sums"])]
    if fused:
        nodes += [
            helper.make_node("Cast", ["sums"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["floats", "scale"], ["y"]),
        ]
    output = helper.make_tensor_value_info(
        "y" if fused else "sums", TensorProto.FLOAT if fused else TensorProto.INT32, ["m", columns]
    )
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "product", inputs, [output], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("fused", [False, True], ids=["sums", "fused"])
@pytest.mark.parametrize("constant", [False, True], ids=["computed", "constant"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 7, 33, 64, 1024, 4101])
def test_worst_codes_are_summed_exactly(tmp_path: Path, depth: int, constant: bool, fused: bool) -> None:
    """Largest and smallest codes in runs and in turn, rows and columns that fill no vector."""
    runs = np.array([[255], [0], [128]]) + np.zeros(depth, int)
    turns = np.resize([255, 255, 0, 128, 255], depth)
    codes = np.vstack([runs, turns]).astype(np.uint8)
    for columns in (1, 5, 16, 33):
        weights = np.resize(np.vstack([runs, turns + (turns == 128)]), (columns, depth)).T.astype(np.uint8)
        expected = (codes.astype(np.int64) - 128) @ (weights.astype(np.int64) - 128)
        file = product(tmp_path / f"{columns}.onnx", weights, constant, fused)
        (found,) = ONNXRUNTIME.open(file, threads=1).run({"x": codes} | ({} if constant else {"w": weights})).values()
        np.testing.assert_array_equal(found, expected.astype(found.dtype))


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worst")
    return folder / write_worst_case(folder, FORM)


class Saturating:
    """onnxruntime, had it no more than so many bits for a sum."""

    name, form = "saturating", FORM

    def __init__(self, largest: float) -> None:
        self.largest = largest

    def version(self) -> str:
        return "0"

    def open(self, graph: Path, threads: int = 0) -> Session:
        session, largest = ONNXRUNTIME.open(graph, threads), self.largest

        class Clipped:
            def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
                return {name: np.clip(value, -largest, largest) for name, value in session.run(inputs).items()}

        return Clipped()


def test_every_kind_of_layer_is_exact_here(graph: Path) -> None:
    assert findings(ONNXRUNTIME, graph) == dict.fromkeys(
        ("linear", "conv2d", "attention scores", "attention values"), None
    )
    require_exact(ONNXRUNTIME, graph)


@pytest.mark.parametrize(("largest", "kind"), [(2.0**20, "linear"), (0.8, "linear")])
def test_an_engine_that_saturates_is_refused_with_that_reason(graph: Path, largest: float, kind: str) -> None:
    wrong = [name for name, what in findings(Saturating(largest), graph).items() if what is not None]
    assert (
        wrong == ["linear", "conv2d"] if largest > 1 else ["linear", "conv2d", "attention scores", "attention values"]
    )
    with pytest.raises(ArtifactError, match=rf"saturating 0 computes {kind} .* wrong on this machine: .* instead of"):
        require_exact(Saturating(largest), graph)


def test_an_export_to_such_an_engine_leaves_nothing(tiny_pixels: Path, pack_all: Any, tmp_path: Path) -> None:
    timesteps = [999.0, 1.0]
    source = PipelineFolder(tiny_pixels, "pixels")
    edits, tensors = pack_all(load_pipeline(source).unet, "unet", 8, 8, len(timesteps))
    write_pipeline(tmp_path / "source", source, edits, {"unet": tensors}, timesteps)
    with pytest.raises(ArtifactError, match="computes linear on codes wrong"):
        export_onnx(PipelineFolder(tmp_path / "source", "packed"), tmp_path / "out", engine=Saturating(2.0**20))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


SCRIPT = """
import json, sys
from pathlib import Path
from typing import Any
from diffpress.export.engines.onnxruntime import ONNXRUNTIME
from diffpress.export.engines.worst_case import findings
print(json.dumps([findings(ONNXRUNTIME, Path(path)) for path in sys.argv[1:]]))
"""


@pytest.mark.long
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-user (apt-get install qemu-user)")
def test_exact_on_a_processor_without_vnni(graph: Path, tmp_path: Path) -> None:
    """The other form saturates there, which shows that the processor is one of those that matter."""
    import json

    other = tmp_path / write_worst_case(tmp_path, "uint8 x int8")
    command = ["qemu-x86_64", "-cpu", "Haswell", sys.executable, "-c", SCRIPT, str(graph), str(other)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    exact, saturated = json.loads(done.stdout.splitlines()[-1])
    assert set(exact.values()) == {None}
    assert saturated["linear"] is not None
    assert saturated["conv2d"] is not None
