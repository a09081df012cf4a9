"""When the C++ library answers."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from diffpress.kernels import quantized_linear
from diffpress.kernels.cpu import library, why_no_library
from diffpress.kernels.quantized_linear import cpu_kernel

NEEDED = {"avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512_vnni"}


def test_it_is_there_where_the_processor_can_run_it() -> None:
    information = Path("/proc/cpuinfo")
    flags = set(information.read_text().split()) if information.exists() else set()
    can = platform.machine() == "x86_64" and flags >= NEEDED and "amx_int8" not in flags
    assert (why_no_library() is None) == can, why_no_library()


def arguments() -> tuple:
    weight = torch.arange(-32, 32, dtype=torch.int8).view(4, 16)
    return torch.ones(2, 16), weight, torch.ones(4), torch.ones(1), None, None, 8, 8


def test_without_it_the_reference_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = quantized_linear(*arguments())
    monkeypatch.setattr(cpu_kernel, "compute_linear", None)
    monkeypatch.setattr(library, "_folders", list)
    for function in (library._loaded, library.why_no_library):
        function.cache_clear()
    try:
        assert why_no_library() == "no C++ library was built"
        assert torch.equal(quantized_linear(*arguments()), expected)
    finally:
        monkeypatch.undo()
        for function in (library._loaded, library.why_no_library):
            function.cache_clear()


def test_formats_that_it_does_not_know_go_to_the_reference() -> None:
    x, *rest = arguments()
    assert quantized_linear(x.double(), *rest).dtype == torch.float64
    assert torch.equal(quantized_linear(x.double(), *rest).float(), quantized_linear(x, *rest))
