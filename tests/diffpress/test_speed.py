"""What a user is told of speed, and when: times are made up."""

from __future__ import annotations

import html
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffpress import flow, measuring
from diffpress.export.edits import Pack
from diffpress.export.manifest import REPORT, read_manifest
from diffpress.export.runtime import Expansion, LayerForm, Times
from diffpress.export.runtime.expansion import Candidate
from diffpress.report import write_report
from diffpress.speed import Speed

EDIT = Pack(component="", module="", weight_bits=8, activation_bits=8)
FORM = LayerForm(EDIT, (64, 8), 8, torch.float32)
EXPANSION = Expansion({"unet.a": Candidate(FORM, 1, 256)}, {FORM: Times(3.0, 1.0)}, frozenset({"unet.a"}), others=1)
PACKED = {
    "latency_ms": {"reference": 1.0, "candidate": 3.9, "ratio": 3.9},
    "peak_memory_bytes": {"reference": 9_000, "candidate": 4_000},
}
SPEED = Speed(1.0, True, "AMD EPYC, 2 threads, C++", EXPANSION, PACKED)


@pytest.mark.parametrize(
    ("ratio", "smaller", "words"),
    [
        (0.5, True, "faster"),
        (0.95, True, "faster"),
        (0.951, True, "as fast"),
        (1.05, True, "as fast"),
        (1.051, True, "smaller, not faster"),
        (1.051, False, "slower"),
    ],
)
def test_a_ratio_in_words(ratio: float, smaller: bool, words: str) -> None:
    speed = replace(SPEED, ratio=ratio, smaller=smaller)
    assert speed.words() == words
    assert speed.headline().endswith(f"{ratio:.2f} of the original's time on AMD EPYC, 2 threads, C++")
    assert speed.told_before_saving() == (ratio > 1.05)


def test_what_is_expanded_is_told_with_what_it_is_like_without() -> None:
    assert SPEED.detail() == (
        "1 of 2 packed layers are slower than floats there and are expanded at load, which takes 256 B. "
        'With prefer="memory", as with plain diffusers, all stay packed: 3.90 of the original\'s time, 4.00 kB at most'
    )
    assert replace(SPEED, packed={}).detail() == ""
    assert SPEED.data() == {
        "words": "as fast",
        "ratio": 1.0,
        "machine": "AMD EPYC, 2 threads, C++",
        "prefer_memory": PACKED,
        "packed_layers": 1,
        "expanded_layers": 1,
        "expanded_bytes": 256,
    }


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings that were given when an artifact was put into place; an image takes it 1.42 of the original's time."""
    found: list[str] = []
    measure, publish = flow.measure, flow.publish

    def slower(*arguments: Any) -> measuring.Measured:
        measured = measure(*arguments)
        measured.cost["latency_ms"] = {"reference": 1.0, "candidate": 1.42, "ratio": 1.42}
        return measured

    def look(*arguments: Any) -> None:
        found.extend(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
        caplog.clear()
        publish(*arguments)

    monkeypatch.setattr(flow, "measure", slower)
    monkeypatch.setattr(flow, "publish", look)
    return found


def test_a_slower_pipeline_is_told_before_it_is_saved_and_what_is_stored_does_not_depend_on_times(
    tiny_pixels: Path,
    quick_recipe: Path,
    tmp_path: Path,
    diffpress: Any,
    digests: Any,
    told: list[str],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = flow.compress_by_name(tiny_pixels, quick_recipe, tmp_path / "packed")
    told.clear()
    request.getfixturevalue("floats_win")
    # The other way of timing: one after the other.
    monkeypatch.setattr(measuring, "both_fit", lambda *_: False)
    out = tmp_path / "expanded"
    printed = json.loads(diffpress("compress", tiny_pixels, "--recipe", quick_recipe, "--out", out, "--json").output)
    assert digests(packed.path) == digests(out)
    headline = "Smaller, not faster: 1.42 of the original's time on "
    # What is said of the quality of a model of random weights comes before it.
    assert [sentence.startswith(headline) for sentence in told if "the original's time" in sentence] == [True]
    assert packed.speed is not None
    assert not packed.speed.packed
    assert printed["speed"]["expanded_layers"] == len(packed.manifest.layers) > 5
    assert printed["speed"]["prefer_memory"]["peak_memory_bytes"] == packed.cost["peak_memory_bytes"]
    assert printed["peak_memory_bytes"]["candidate"] > packed.cost["peak_memory_bytes"]["candidate"]
    report = html.unescape((out / REPORT).read_text())
    assert headline in report
    assert "here 2 ms packed, 1 ms in floats (" in report
    assert_inspected(diffpress, out)


def assert_inspected(diffpress: Any, out: Path) -> None:
    """What becomes of its layers here, without loading it."""
    printed = json.loads(diffpress("inspect", out, "--json").output)
    count = len(read_manifest(out).layers)
    assert printed["here"]["expanded_layers"] == count > 5
    assert printed["here"]["packed_layers"] == 0
    assert printed["here"]["expanded_bytes"] > 0
    assert {tuple(own.values()) for own in printed["here"]["forms"].values()} == {(2, 1)}
    shown = " ".join(diffpress("inspect", out).output.split())
    assert f"loaded here │ {count} of {count} packed layers" in shown


def test_the_headline_stands_in_a_comparison_too(make_report: Any) -> None:
    page = make_report(SPEED)
    assert "<b>As fast: 1.00 of the original&#39;s time on AMD EPYC, 2 threads, C++.</b> 1 of 2 packed layers" in page
    assert "at most.</p>" in page
    assert "original&#39;s time" not in make_report(None)


@pytest.fixture
def make_report(tmp_path: Path) -> Any:
    """A function: the report of a comparison of nothing much, with that speed."""
    from diffpress.calibration.conditions import Condition
    from diffpress.pairs import Pairs

    def make(speed: Speed | None) -> str:
        images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        pairs = Pairs([Condition("", 0)], images, images * 0.9, [20.0], 0.9, 0.1, [0.1, 0.2], 2)
        write_report(tmp_path / REPORT, "tiny", None, pairs, pairs.metrics(), {}, speed)
        return (tmp_path / REPORT).read_text()

    return make
