"""Which order learning takes: the recipe's or, left out, the one that fits; settled once, and written down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from torch import Tensor, nn

from diffpress.calibration import cost
from diffpress.compress.options import Qalora
from diffpress.compress.qalora import order as orders
from diffpress.compress.qalora.order import check_order, choose_order, learning_bytes, settle_order
from diffpress.compress.stage import Subject
from diffpress.export.errors import RecipeError


def options_of(**chosen: object) -> Qalora:
    return Qalora(method="qalora", weights=4, iterations=2, batch=2, validation_images=2, **chosen)


def free(amount: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "free_bytes", lambda _pipeline: amount)


@pytest.mark.parametrize("source", ["tiny_text", "tiny_class", "tiny_pixels"])
def test_left_out_it_is_whole_where_that_fits(
    source: str, recorded_subject: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = recorded_subject(source)
    needed = learning_bytes(subject, options_of())
    assert 0 < needed["blocks"] < needed["whole"]
    # A tenth is left to others.
    for amount, expected in ((needed["whole"], "blocks"), (needed["whole"] * 2, "whole"), (0, "blocks")):
        free(amount, monkeypatch)
        assert choose_order(subject, options_of()) == expected
    for said in ("whole", "blocks"):
        assert choose_order(subject, options_of(order=said)) == said


def test_it_stays_as_it_was_settled_in_a_folder(
    recorded_subject: Callable[[str], Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = recorded_subject("tiny_class")
    free(0, monkeypatch)
    assert settle_order(subject, options_of(), tmp_path / "a") == "blocks"
    free(10**12, monkeypatch)
    assert settle_order(subject, options_of(), tmp_path / "a") == "blocks"
    assert settle_order(subject, options_of(), tmp_path / "b") == "whole"


class Plain(nn.Module):
    """A denoiser of two layers that nothing repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 64, 3, padding=1), nn.Conv2d(64, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.last(self.first(sample))


def test_a_denoiser_without_blocks_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"Plain has none\. Give whole; .*accumulate"):
        check_order(Plain(), options_of(order="blocks"))
    check_order(Plain(), options_of(order="whole"))


def test_free_memory_counts_what_the_pipeline_takes_itself(
    recorded_subject: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    pipeline = recorded_subject("tiny_class").pipeline
    weights = sum(
        tensor.numel() * tensor.element_size()
        for part in (pipeline.transformer, pipeline.vae)
        for tensor in (*part.parameters(), *part.buffers())
    )
    assert cost.free_bytes(pipeline) == 1000 + weights
