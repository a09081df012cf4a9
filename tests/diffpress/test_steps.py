"""Steps that inherit, the whole way: alone and on a quantized model, killed and continued, run in plain diffusers, refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, HeunDiscreteScheduler
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from diffpress.calibration.conditions import Condition
from diffpress.calibration.cost import operation_formulas
from diffpress.calibration.sampling import Sampling, denoiser_of, sample
from diffpress.compress.steps import trials
from diffpress.export.artifact import load_pipeline, verify
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import read_manifest
from diffpress.export.portable.manifest import read_export
from diffpress.flow import compress
from diffpress.recipe import parse_recipe

STEPS = 6
RECIPE: dict[str, Any] = {
    "sampling": {"steps": STEPS},
    "record": {"trajectories": 2, "batch": 2},
    "steps": {"method": "inherit", "speedup": 1.3, "trials": 10, "images": 2},
}
QUANTIZED: dict[str, Any] = {**RECIPE, "quantize": {"method": "ptq"}}


def made(model: Path, out: Path, recipe: dict[str, Any] = RECIPE) -> Path:
    return compress(PipelineFolder(model, "tiny"), parse_recipe(recipe), out).path


@pytest.fixture(scope="module")
def planned(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny text pipeline in eight bits, with a plan fitted to it."""
    return made(tiny_text, tmp_path_factory.mktemp("planned") / "artifact", QUANTIZED)


def test_a_quantized_model_with_a_plan_is_one_sound_artifact(planned: Path, tiny_text: Path) -> None:
    verify(planned)
    manifest = read_manifest(planned)
    assert {edit.kind for edit in manifest.edits} == {"pack", "attach"}
    row = next(row for row in manifest.plan if row.module == "step_plan")
    assert "times fewer multiplications" in row.reason
    source, artifact = PipelineFolder(tiny_text, "tiny"), PipelineFolder(planned, "artifact")
    assert sum(row.bytes for row in manifest.plan) == artifact.component_bytes("unet")
    assert artifact.component_bytes("unet") < source.component_bytes("unet")


def counted(pipeline: Any) -> int:
    """Multiply-accumulates of an image."""
    with FlopCounterMode(display=False, custom_mapping=operation_formulas()) as counter:
        sample(pipeline, [Condition("red apple", 1)], Sampling(STEPS))
    counts = counter.get_flop_counts()
    return sum(counts[type(denoiser_of(pipeline)).__name__].values()) // 2


def test_it_makes_as_many_fewer_multiplications_as_asked(planned: Path, tiny_text: Path) -> None:
    plain, ours = (load_pipeline(PipelineFolder(path, "tiny")) for path in (tiny_text, planned))
    assert counted(plain) / counted(ours) >= RECIPE["steps"]["speedup"]


def test_plain_diffusers_draws_what_was_measured_for_other_steps_and_twice_alike(planned: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(planned)
    ours = load_pipeline(PipelineFolder(planned, "tiny"))
    for steps in (STEPS, 4, 9):
        images = [
            sample(own, [Condition("red apple", 3)], Sampling(steps)).images for own in (pipeline, ours, pipeline)
        ]
        assert all(torch.equal(image, images[0]) for image in images)


def test_a_speed_up_may_be_one_of_time(tiny_class: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that take next to no time save nothing of it: many more steps are inherited than multiplications ask for."""
    times = lambda *given: replace(given[-1], units=(600,), total=1000)  # noqa: E731
    monkeypatch.setattr("diffpress.compress.steps.inherit.in_nanoseconds", times)
    out = made(tiny_class, tmp_path / "artifact", {**RECIPE, "steps": {**RECIPE["steps"], "budget": "latency"}})
    manifest = read_manifest(out)
    (edit,) = manifest.edits
    # 6 steps of 1,000 over 1.3 are 4,615: four steps of 400 beside what is computed leave room for no more than three.
    assert edit.settings.cells.sum() == 3  # type: ignore[union-attr]
    (reason,) = (row.reason for row in manifest.plan if row.module == "step_plan")
    assert "times fewer multiplications" in reason
    assert "1.43 times faster where it was fitted" in reason


@pytest.mark.long
def test_a_killed_search_continues_to_the_same_bytes(planned, tiny_text, digests, tmp_path, monkeypatch) -> None:
    """Tried plans are not tried again."""
    asked: list[object] = []
    plain = trials.sampled

    def killed(*arguments: Any) -> Any:
        asked.append(arguments)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr("diffpress.compress.steps.inherit.sampled", killed)
    with pytest.raises(KeyboardInterrupt):
        made(tiny_text, tmp_path / "artifact", QUANTIZED)
    assert not (tmp_path / "artifact").exists()
    made(tiny_text, tmp_path / "artifact", QUANTIZED)
    tried = sum("psnr_db" in row for row in read_manifest(planned).learning)
    assert len(asked) == tried + 1
    assert digests(tmp_path / "artifact") == digests(planned)


@pytest.mark.parametrize(
    "level",
    [pytest.param("branch", marks=pytest.mark.long), pytest.param("block", marks=pytest.mark.long), "stack", "whole"],
)
def test_every_level_and_storage_goes_the_whole_way(request, tmp_path: Path, level: str) -> None:
    storage = {"branch": "bfloat16", "block": "int8", "stack": "computed", "whole": "computed"}[level]
    # The one calls its denoiser for a tuple, the other for a named output.
    model = request.getfixturevalue("tiny_pixels" if level == "whole" else "tiny_class")
    own = {**RECIPE["steps"], "level": level, "cache": storage, "schedule": "uniform"}
    out = made(model, tmp_path / "artifact", {**RECIPE, "steps": own})
    (edit,) = read_manifest(out).edits
    assert edit.settings.storage == storage  # type: ignore[union-attr]
    verify(out)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"speedup": 50}, r"steps.speedup 50: [\d.]+ is the most that can be reached here"),
        (
            {"speedup": 50, "budget": "latency"},
            r"[\d.]+ is the most that can be reached here.* of an image's time is taken whatever is inherited",
        ),
        ({"cache_mb": 1e-6}, r"has no blocks that could be inherited in cache_mb 1e-06. Give more"),
    ],
)
def test_what_cannot_be_reached_is_refused_before_any_work(diffpress, tiny_class, tmp_path, own, words) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({**RECIPE, "steps": {**RECIPE["steps"], **own}}))
    status, _, errors = diffpress("compress", tiny_class, "--recipe", file, "--out", tmp_path / "out")
    assert status == 2
    assert list(tmp_path.iterdir()) == [file]
    assert re.search(words, " ".join(errors.split()))


def test_a_scheduler_that_calls_more_often_at_some_steps_is_refused(tiny_class: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(PipelineFolder(tiny_class, "tiny"))
    pipeline.scheduler = HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "heun")
    with pytest.raises(UnsupportedModelError, match=r"calls the denoiser \[1, 2\] times a step"):
        made(tmp_path / "heun", tmp_path / "out")


@pytest.mark.long
def test_an_export_of_a_plan_draws_the_same_image(diffpress, planned: Path, tmp_path: Path) -> None:
    status, _, errors = diffpress("export", planned, "--to", "onnx", "--out", tmp_path / "onnx")
    assert status == 0, errors
    asked = ("--prompt", "red apple", "--seed", 3, "--steps", STEPS, "--guidance", 3)
    for model, image in ((planned, "torch.png"), (tmp_path / "onnx", "onnx.png")):
        status, _, errors = diffpress("run", model, *asked, "--out", tmp_path / image)
        assert status == 0, errors
    ours, theirs = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("torch.png", "onnx.png"))
    # A level of rounding, and what codes at edges make of it: see the self test.
    limit = 1 + 255 * read_export(tmp_path / "onnx").self_test.tolerance
    assert np.sqrt(np.square(ours - theirs).mean()) <= limit
