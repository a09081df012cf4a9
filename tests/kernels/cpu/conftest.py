"""What tests of the CPU's kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from diffpress.kernels.cpu.library import CHOICE as TIER
from diffpress.kernels.cpu.library import ONEDNN, built_tiers, processor_tiers
from diffpress.kernels.library import CHOICE

TIERS = [tier for tier in processor_tiers() if tier != ONEDNN and tier in built_tiers()]


@pytest.fixture(autouse=True, params=TIERS or [None], ids=str)
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, references_answer: None) -> str | None:
    """Operations are their kernels again, of every tier that the processor has."""
    monkeypatch.delenv(CHOICE)
    if request.param:
        monkeypatch.setenv(TIER, request.param)
    return request.param


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Alone, and with others."""
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)
