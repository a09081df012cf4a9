"""Both pipelines are measured alike, whether both fit into memory or one at a time does."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from diffpress import measuring
from diffpress.calibration.sampling import Sampling
from diffpress.export.artifact import load_pipeline
from diffpress.export.folder import PipelineFolder
from diffpress.measuring import both_fit, measure
from diffpress.pairs import paired_conditions


def test_the_original_is_gone_before_the_other_is_loaded_where_both_do_not_fit(
    tiny_pixels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[Any] = []
    seen: list[int] = []

    def load() -> Any:
        gc.collect()
        seen.append(sum(own() is not None for own in alive))
        pipeline = load_pipeline(PipelineFolder(tiny_pixels, "tiny"))
        alive.append(weakref.ref(pipeline.unet))
        return pipeline

    found = []
    for fit in (True, False):
        monkeypatch.setattr(measuring, "both_fit", lambda *_, fit=fit: fit)
        told: list[tuple[int, int]] = []
        found.append(
            measure(
                load, load, lambda own: paired_conditions(own, 3, 0), Sampling(2), lambda *t, told=told: told.append(t)
            )
        )
        assert told == [(1, 2), (2, 2)]
    assert seen == [0, 1, 0, 0]
    together, apart = found
    assert together.pairs.metrics() == apart.pairs.metrics()
    assert together.pairs.psnr_db == pytest.approx([100] * 3)
    assert together.cost.keys() == apart.cost.keys()
    assert together.cost["macs_per_image"] == apart.cost["macs_per_image"]


def test_both_fit_where_the_memory_that_is_left_holds_another(
    tiny_pixels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_pipeline(PipelineFolder(tiny_pixels, "tiny"))
    monkeypatch.setattr(measuring, "free_bytes", lambda _pipeline: 1000 + measuring.weight_bytes(pipeline))
    assert both_fit(pipeline, 900)
    assert not both_fit(pipeline, 901)
