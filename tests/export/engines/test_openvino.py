"""OpenVINO runs what onnxruntime runs, in integers only where they are exact."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from diffpress.export.engines import openvino, openvino_library
from diffpress.export.engines.engine import Array
from diffpress.export.engines.named import engine_named
from diffpress.export.engines.openvino import OpenVino
from diffpress.export.engines.openvino_products import NARROW, WIDE, ExactProducts, exact_products
from diffpress.export.engines.worst_case import findings, require_exact
from diffpress.export.errors import ArtifactError, UserError
from diffpress.export.onnx.worst_case import write_worst_case

ENGINE = OpenVino()
LARGEST = 2.0**15 - 1
"""Of 16 bits."""


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worst")
    return folder / write_worst_case(folder, ENGINE.form)


def test_every_kind_of_layer_is_exact_here(graph: Path) -> None:
    require_exact(ENGINE, graph)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_integers_that_saturate_are_found(graph: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were all products in integers, those would be wrong that are in floats because they would be."""
    found = ENGINE.exact_products()
    monkeypatch.setattr(openvino, "_exact_products", lambda device: ExactProducts(WIDE, WIDE))
    assert (findings(ENGINE, graph)[kind] is None) == (getattr(found, kind) == WIDE)


def test_convolutions_of_narrow_weights_are_in_integers_everywhere() -> None:
    assert ENGINE.exact_products().conv2d in (NARROW, WIDE)


def test_a_device_that_saturates_computes_in_floats() -> None:
    def run(model: object, x: Array) -> Array:
        sums = next(iter(openvino._compiled(model, "CPU", 1).run({"x": x}).values()))
        kinds = {node.get_type_name() for node in model.get_ops()}
        return np.clip(sums, -LARGEST, LARGEST) if "FakeQuantize" in kinds else sums

    found = exact_products(run)
    assert found == ExactProducts(0, 0)
    assert "in integers with no weights" in found.words()


def test_engines_go_by_their_names() -> None:
    assert [engine_named(name).name for name in ("onnx", "openvino", "openvino:cpu", "openvino:GPU")] == [
        "onnxruntime",
        "openvino",
        "openvino",
        "openvino:GPU",
    ]
    for name in ("tensorrt", "openvino:", "onnx:GPU"):
        with pytest.raises(UserError, match=f"--engine {name}: exports run with onnx, openvino"):
            engine_named(name)


def test_a_device_that_is_not_there_is_named(graph: Path) -> None:
    with pytest.raises(UserError, match="--engine openvino:NOWHERE: OpenVINO finds CPU"):
        OpenVino("NOWHERE").open(graph)


def test_a_graph_that_it_cannot_load_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match=r"bad\.onnx: openvino .* cannot load it"):
        ENGINE.open(tmp_path / "bad.onnx")


def test_where_it_is_missing_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    for ask in (openvino_library.library, openvino_library.operators):
        with pytest.raises(UserError, match=r"pip install 'diffpress\[openvino\]'"):
            ask()
