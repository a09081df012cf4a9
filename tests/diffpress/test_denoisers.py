"""Pipelines whose denoisers are several, or are called with lists, from a recipe to a loaded artifact."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import diffpress
from diffpress import flow
from diffpress.calibration.sampling import Sampling, sample
from diffpress.export.artifact import verify
from diffpress.export.errors import UnsupportedModelError, UserError
from diffpress.export.folder import PipelineFolder
from diffpress.models import resolve
from diffpress.pairs import paired_conditions
from diffpress.recipe import parse_recipe

BENCH = Path(__file__).parents[2] / "bench"
SIZES = {"height": 32, "width": 32, "max_sequence_length": 16}
QUANTIZE = {"method": "ptq", "weights": 8, "activations": 8}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """A function: the saved pipeline of that name, built once."""
    sys.path.insert(0, str(BENCH))
    makers = import_module("small_denoisers").DENOISERS
    folder = tmp_path_factory.mktemp("small")

    def saved(name: str) -> Path:
        if not (folder / name).exists():
            torch.manual_seed(0)
            makers[name](folder).save_pretrained(folder / name)
        return folder / name

    yield saved
    sys.path.remove(str(BENCH))


def made(source: Path, out: Path, call: dict[str, Any], **stages: Any) -> Any:
    recipe = {"sampling": {"steps": 4, "call": SIZES | call}, "record": {"trajectories": 1, "batch": 1}, **stages}
    return flow.compress(resolve(str(source)), parse_recipe(recipe), out)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "call", "parts"),
    [("Wan 2.2", {"num_frames": 5}, {"transformer": 1, "transformer_2": 3}), ("Z-Image", {}, {})],
)
def test_every_denoiser_is_packed_at_its_own_time_steps(
    small: Callable[[str], Path],
    name: str,
    call: dict[str, Any],
    parts: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flow, "MEASURED", 1)
    manifest = made(small(name), tmp_path / "out", call, quantize=QUANTIZE).manifest
    assert {part: len(times) for part, times in manifest.parts.items()} == parts
    assert {edit.component for edit in manifest.edits} == set(parts or ["transformer"])
    assert manifest.metrics["steps"] == 4
    if parts:
        assert manifest.timesteps == [time for own in manifest.parts.values() for time in own]
        for part, times in manifest.parts.items():
            assert PipelineFolder(tmp_path / "out", "").config(part)["quantization_config"]["timesteps"] == times
    verify(tmp_path / "out")
    images = [
        sample(pipeline, paired_conditions(pipeline, 1, 0), Sampling(4, call=SIZES | call)).images
        for pipeline in (
            diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out"),
            diffpress.load(tmp_path / "out", prefer="memory"),
        )
    ]
    assert torch.isfinite(images[0]).all()
    assert torch.equal(*images)


@pytest.mark.long
@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (
            {"quantize": {"method": "qalora"}},
            "qalora works on pipelines with one denoiser, and WanPipeline has transformer",
        ),
        ({"prune": {"method": "masks"}}, "masks works on pipelines with one denoiser"),
        (
            {"steps": {"method": "inherit"}},
            "transformer of WanPipeline answers at some steps and other parts at others",
        ),
        ({"quantize": QUANTIZE | {"components": ["transformer_2", "vae"]}}, "only weights of vae can be rounded"),
        ({"quantize": QUANTIZE | {"components": ["unet"]}}, "has no component 'unet'; its parts are"),
    ],
    ids=str,
)
def test_what_does_not_work_on_several_is_refused_before_any_work(
    small: Callable[[str], Path], stages: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        made(small("Wan 2.2"), tmp_path / "out", {"num_frames": 5}, **stages)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_denoiser_is_refused_by_its_parts(tiny_text: Path) -> None:
    folder = PipelineFolder(tiny_text, "mine")
    assert folder.denoisers == ["unet"]
    del folder.components["unet"]
    without = PipelineFolder(tiny_text, "mine")
    without.__dict__["components"] = folder.components
    with pytest.raises(
        UnsupportedModelError, match=r"mine has no part that is told the time step.*its parts are scheduler,"
    ):
        _ = without.denoisers
