"""What a `compress` is said to take, beside what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler

from diffpress.compress.qalora.method import ROLLOUT_CONDITIONS, student_rollouts
from diffpress.compress.qalora.training_data import TrainingData
from diffpress.estimate import estimate, needed_bytes
from diffpress.export.artifact import load_pipeline
from diffpress.export.folder import PipelineFolder
from diffpress.flow import compress
from diffpress.recipe import Recipe, parse_recipe
from diffpress.stages import component_forms, stages_of

LEARN = {"method": "qalora", "weights": 4, "activations": 8, "rank": 4, "batch": 4, "validation_images": 1}


def recipe_of(**options: Any) -> Recipe:
    return parse_recipe(
        {"sampling": {"steps": 3}, "record": {"trajectories": 4, "batch": 2}, "quantize": {**LEARN, **options}}
    )


def tensor_bytes(folder: Path) -> int:
    """Bytes of the tensors in all files under `folder`: each file begins with the length of its header."""
    files = [path for path in folder.rglob("*.safetensors") if path.is_file()]
    return sum(path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in files)


def test_the_disk_that_learning_takes_is_counted(
    tiny_class: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = PipelineFolder(tiny_class, "tiny"), recipe_of(iterations=6)
    said = estimate(folder, recipe)["disk_bytes"] - needed_bytes(folder)
    seen: list[int] = []
    parts: dict[str, int] = {}
    forget = TrainingData.forget

    def look(training_data: TrainingData, latest: int) -> None:
        """When a checkpoint was written and no round is deleted yet."""
        work = training_data.runs.folder
        seen.append(tensor_bytes(tmp_path / ".out.diffpress-work"))
        parts["checkpoint"] = tensor_bytes(work) - sum(tensor_bytes(own) for own in work.glob("round-*"))
        parts["round"] = max((tensor_bytes(own) for own in work.glob("round-*")), default=0)
        forget(training_data, latest)

    monkeypatch.setattr(TrainingData, "forget", look)
    compress(folder, recipe, tmp_path / "out")
    assert len(seen) == 6
    # A checkpoint lies there twice while it is written, and the changes, as large as their component at most, come last.
    changes = folder.component_bytes("transformer")
    # Scales of single steps are not counted, a few numbers a layer.
    assert 0.9 * max(seen) <= said <= max(seen) + parts["checkpoint"] + parts["round"] + changes


@pytest.mark.parametrize("count", [1, 512, 600])
def test_any_number_of_images_may_be_held_out(count: int, tiny_class: Path, tmp_path: Path) -> None:
    folder, recipe = PipelineFolder(tiny_class, "tiny"), recipe_of(validation_images=count)
    (stage,) = stages_of(folder, load_pipeline(folder), recipe, component_forms(folder, recipe))
    runs = student_rollouts(stage.subject, stage.options, tmp_path)
    assert len(runs.validation_images) == count
    assert len(runs.wanted) == len(set(runs.wanted)) == ROLLOUT_CONDITIONS
    assert not set(runs.wanted) & set(runs.validation_images)


def test_an_estimate_samples_as_few_steps_as_the_pipeline_makes(
    tiny_class: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = PipelineFolder(tiny_class, "tiny"), recipe_of()
    recipe = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"steps": 10})})
    set_timesteps, asked = DDIMScheduler.set_timesteps, list[int]()

    def at_least_four(scheduler: DDIMScheduler, steps: int, **others: Any) -> None:
        if steps < 4:
            raise ValueError("four or more")
        asked.append(steps)
        set_timesteps(scheduler, steps, **others)

    from_two = estimate(folder, recipe)
    monkeypatch.setattr(DDIMScheduler, "set_timesteps", at_least_four)
    from_four = estimate(folder, recipe)
    assert set(asked) == {4}
    assert from_two["steps"] == from_four["steps"] == 10
    # Every step but the first writes as much as any other.
    assert from_two["disk_bytes"] == from_four["disk_bytes"]
