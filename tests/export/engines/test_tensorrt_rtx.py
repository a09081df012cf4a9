"""Engines for GPUs that are not here: what the builder says is understood, and what it cannot do is advice."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from diffpress.export.engines import tensorrt_rtx
from diffpress.export.engines.onnxruntime import FOLDED
from diffpress.export.engines.tensorrt_build import layers_of
from diffpress.export.engines.tensorrt_rtx import TARGETS, build_engine, check_targets
from diffpress.export.engines.worst_case import require_exact
from diffpress.export.errors import ArtifactError, UserError
from diffpress.export.onnx.worst_case import write_worst_case


def line(name: str, kind: str, given: str, weights: str) -> str:
    """Of the builder's report, shortened."""
    tensors = [f"{{ Name: t, Dimensions: [-1,10], Datatype: {own}, Format: (Linear) }}" for own in (given, weights)]
    return f"Name: {name}, LayerType: {kind}, Inputs: [ {tensors[0]}], Constants: [ {tensors[1]}], Outputs: [ {tensors[0]}]"


def test_layers_are_counted_by_what_they_compute_in() -> None:
    report = [
        line("node_MatMul_194+node_MatMul_178_myl0_2", "gemm", "Int8", "Int8"),
        line("node_Conv_98_myl0_4", "correlation", "Int8", "Int8"),
        line("node_Conv_99_myl0_5", "correlation", "Half", "Half"),
        line("node_MatMul_3_myl0_6", "runtime_fusion", "Half", "Int4"),
        line("__myl_Add_myl0_7", "kgen", "Int8", "Int8"),
        "Name: something else",
    ]
    assert layers_of(report) == {"Half": 1, "Int4": 1, "Int8": 3}


def test_graphs_for_it_are_exact_where_they_are_checked(tmp_path: Path) -> None:
    require_exact(FOLDED, tmp_path / write_worst_case(tmp_path, FOLDED.form))


@pytest.mark.parametrize("targets", [["sm_90"], ["sm_86", "sm_87"], []])
def test_a_target_that_it_cannot_build_for_is_named(targets: list[str]) -> None:
    with pytest.raises(UserError, match=r"--target .*TensorRT-RTX builds for sm_75, sm_80"):
        check_targets(targets)


@pytest.mark.parametrize(
    ("status", "output", "words"),
    [
        (-11, "", r"crashed \(SIGSEGV\)"),
        (-9, "", r"crashed \(SIGKILL\)\. There may be too little memory"),
        (1, "", "could not be asked: ImportError: no"),
        (0, '{"errors": ["HW-specific datatypes: fp8_e4m3"]}', r"builds no engine .*float8 needs sm_89"),
        (0, '{"errors": ["OutOfMemory"]}', "close other programs"),
        (0, '{"errors": ["No importer registered for op: Strange"]}', "an operator that TensorRT lacks"),
        (0, '{"errors": []}', "it does not say why"),
    ],
)
def test_what_the_builder_says_becomes_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, output: str, words: str
) -> None:
    done = subprocess.CompletedProcess([], status, output, "a\nImportError: no")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(tensorrt_rtx, "version", lambda: "1")
    with pytest.raises(ArtifactError, match=words):
        build_engine(tmp_path / "denoiser.onnx", ["sm_86"])


@pytest.mark.long
def test_integers_run_in_integers_on_every_target_but_turing(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = tmp_path / write_worst_case(tmp_path, FOLDED.form)
    built = build_engine(graph, [name for name in TARGETS if name != "sm_75"])
    # Attention multiplies the codes of computed scales, which it does in floats.
    assert built.layers["Int8"] == 2
    assert (tmp_path / built.file).stat().st_size > 0
    with pytest.raises(ArtifactError, match="leave sm_75 out"):
        build_engine(graph, ["sm_75"])
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match=r"bad\.onnx: TensorRT-RTX .* builds no engine"):
        build_engine(tmp_path / "bad.onnx", ["sm_86"])
