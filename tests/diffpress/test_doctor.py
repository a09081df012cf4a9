"""What the doctor says is what it tried."""

from __future__ import annotations

import sys

import pytest
import torch

from diffpress import doctor
from diffpress.export.runtime import Times
from diffpress.kernels import answering


def test_every_kernel_works_on_the_cpu() -> None:
    tried = {name: finding for name, finding in doctor.examine().items() if name.endswith("on cpu")}
    assert len(tried) == 12
    assert set(tried.values()) == {"works"}


def test_onnxruntime_is_tried_with_worst_case_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ("linear", "conv2d", "attention scores", "attention values")
    findings = doctor.examine()
    assert {kind: findings[f"{kind} in onnxruntime"] for kind in kinds} == dict.fromkeys(kinds, "works")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert doctor.examine()["onnxruntime engine"] == "not installed: onnxscript"


def test_a_wrong_result_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "int8_attention", lambda q, k, v: torch.zeros_like(v))
    monkeypatch.setattr(doctor, "lora_linear", lambda *_: 1 / 0)
    findings = doctor.examine()
    assert findings["int8 attention on cpu"] == "fails: ArithmeticError: expected 64, got 0.0"
    assert findings["low-rank and sparse layers on cpu"] == "fails: ZeroDivisionError: division by zero"
    assert findings["norms into codes on cpu"] == "works"


def test_it_says_which_implementation_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFPRESS_KERNELS", raising=False)
    monkeypatch.setattr(answering, "why_no_library", lambda: None)
    monkeypatch.setattr(answering, "tier", lambda: "avx2")
    assert doctor.examine()["kernels"] == "C++ for avx2 on cpu, Triton on cuda"
    monkeypatch.setattr(answering, "why_no_library", lambda: "no C++ library was built")
    assert doctor.examine()["kernels"] == "reference (no C++ library was built) on cpu, Triton on cuda"
    monkeypatch.setenv("DIFFPRESS_KERNELS", "reference")
    assert doctor.examine()["kernels"] == "reference (DIFFPRESS_KERNELS) on cpu, reference (DIFFPRESS_KERNELS) on cuda"


@pytest.mark.filterwarnings("ignore:TF32")
def test_it_says_how_integers_are_multiplied_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "why_no_byte_products", lambda: None)
    assert doctor.examine()["integer products of the references"] == "in bytes"
    monkeypatch.undo()
    with torch.backends.mkldnn.flags(enabled=False):
        found = doctor.examine()["integer products of the references"]
    assert found == "in float32, exact by chunks of columns (torch runs without oneDNN)"


def test_it_says_what_layers_take_packed_and_in_floats(floats_win: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.examine()
    for way in ("linear [1024, 512] x 512", "linear [1, 1024] x 1024", "conv 3x3 [1, 256, 16, 16] x 256"):
        assert found[f"W4A8 {way}"] == "2 ms, 1 in floats: expanded at load"
    monkeypatch.setattr(doctor, "layer_times", lambda forms, _device: {form: Times(1, 2) for form in forms})
    assert doctor.examine()["W8A8 linear [1024, 512] x 512"] == "1 ms, 2 in floats"
    monkeypatch.setattr(doctor, "layer_times", lambda *_: 1 / 0)
    assert doctor.examine()["times of layers"] == "fails: ZeroDivisionError: division by zero"
