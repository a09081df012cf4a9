"""What tests of the CPU's kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from diffpress.kernels.library import CHOICE


@pytest.fixture(autouse=True)
def kernels_answer(monkeypatch: pytest.MonkeyPatch, references_answer: None) -> None:
    """Operations are their kernels again."""
    monkeypatch.delenv(CHOICE)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Alone, and with others."""
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)
