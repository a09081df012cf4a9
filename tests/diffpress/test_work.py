"""What makes a request another one."""

from __future__ import annotations

import pytest
import torch

from diffpress.kernels import answering
from diffpress.work import computed_by


def test_the_device_and_whose_kernels_compute_are_part_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFPRESS_KERNELS", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index or 0}")
    ways = []
    for reason in (None, "no C++ library was built"):
        monkeypatch.setattr(answering, "why_no_library", lambda reason=reason: reason)
        ways += [computed_by("cpu"), computed_by("cuda:1")]
    monkeypatch.setenv("DIFFPRESS_KERNELS", "reference")
    ways += [computed_by("cpu"), computed_by("cuda:1")]
    # The library of C++ is no matter on a GPU.
    assert len(set(ways)) == 5
    assert ways[1] == ways[3] == "cuda GPU 1, Triton"
