"""What is asked of the processor, and that nothing is computed in a type that it lacks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffpress.kernels import processor
from diffpress.kernels.processor import fast_dtype, why_no_byte_products

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.filterwarnings("ignore:TF32")
def test_bytes_need_onednn_and_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert why_no_byte_products() is None
    with torch.backends.mkldnn.flags(enabled=False):
        assert why_no_byte_products() == "torch runs without oneDNN"
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert why_no_byte_products() == "the processor lacks AVX512-VNNI"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("supported", [False, True])
def test_sixteen_bits_are_multiplied_only_by_a_processor_that_can(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, supported: bool
) -> None:
    answers = dict.fromkeys(processor.HALVES.values(), lambda: supported)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**answers))
    slow = not supported and dtype in processor.HALVES
    assert fast_dtype(torch.ones(1, dtype=dtype)) == (torch.float32 if slow else dtype)
    # Other devices have them.
    assert fast_dtype(torch.ones(1, dtype=dtype, device="meta")) == dtype
