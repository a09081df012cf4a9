"""What tests of kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from diffpress.kernels.library import CHOICE


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every new tensor starts as NaN, or as its largest integer, so that a number which is never written is noticed."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def references_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations are their references here: kernels are called by name, and held to those."""
    monkeypatch.setenv(CHOICE, "reference")
