"""What a `compress` will take, before anything is started."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from math import ceil
from typing import Any

from diffpress.calibration.cost import peak_memory_bytes, weight_bytes
from diffpress.calibration.sampling import sample
from diffpress.calibration.shortest import shortest
from diffpress.calibration.trajectory import observe, recording_bytes
from diffpress.compress.stage import Cost, Running
from diffpress.export.artifact import open_pipeline
from diffpress.export.folder import PipelineFolder

from .precision import recipe_dtype
from .recipe import Recipe
from .stages import Stage, component_forms, recorded_conditions, sampling_of, stages_of

IMAGES = 48
"""Images that measuring makes, those for the timings included."""
REPORT_BYTES = 8_000_000


def needed_bytes(source: PipelineFolder) -> int:
    """Disk that the artifact may take: it is at most as large as its source."""
    return source.size_bytes() + REPORT_BYTES


def disk_bytes(source: PipelineFolder, recipe: Recipe, running: Running, costs: Sequence[Cost]) -> int:
    """Most disk that a `compress` takes at a time, its artifact included."""
    recorded = recipe.record.trajectories * running.run_bytes
    return needed_bytes(source) + recorded + sum(cost.disk_bytes for cost in costs)


def estimate(source: PipelineFolder, recipe: Recipe, device: str = "cpu") -> dict[str, Any]:
    """Seconds, disk and memory of a `compress`, from one timed run in few steps; nothing is written."""
    forms = component_forms(source, recipe)
    dtype = recipe_dtype(source, recipe, device)
    pipeline = open_pipeline(source, dtype).to(device)
    stages = stages_of(source, pipeline, recipe, forms)
    running, batch = running_of(pipeline, recipe), recipe.record.batch
    costs = costs_of(stages, running)
    weights, run_seconds = weight_bytes(pipeline), running.step_seconds * running.steps
    wanted, sampling = recorded_conditions(pipeline, recipe)[:batch], sampling_of(pipeline, recipe)
    return {
        "steps": running.steps,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": {
            "record": run_seconds * running.recorded_batches,
            **{name: seconds for cost in costs for name, seconds in cost.seconds.items()},
            "measure": run_seconds * ceil(IMAGES / batch),
        },
        "disk_bytes": disk_bytes(source, recipe, running, costs),
        "memory_bytes": (peak_memory_bytes(pipeline, wanted[0], sampling) - weights) * len(wanted) + weights,
        **{name: value for cost in costs for name, value in cost.details.items()},
    }


def running_of(pipeline: Any, recipe: Recipe) -> Running:
    """What the pipeline itself takes, from the shortest run that it makes."""
    wanted = recorded_conditions(pipeline, recipe)[: recipe.record.batch]
    sampling = shortest(pipeline, wanted[0], sampling_of(pipeline, recipe))
    seen, steps = observe(pipeline, wanted[:1], sampling), steps_of(pipeline, recipe)
    start = time.perf_counter()
    sample(pipeline, wanted, sampling)
    step_seconds = (time.perf_counter() - start) / seen.step_count()
    batches = ceil(recipe.record.trajectories / recipe.record.batch)
    return Running(steps, step_seconds, batches, recording_bytes(seen, steps))


def costs_of(stages: Sequence[Stage], running: Running) -> list[Cost]:
    """What each stage takes beside."""
    return [stage.method.estimate(stage.subject, stage.options, running) for stage in stages]


def steps_of(pipeline: Any, recipe: Recipe) -> int:
    """The steps of an image: the recipe's, the pipeline's default or, where it has none, those that it is seen to make."""
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("num_inference_steps")
    known = recipe.sampling.steps or (parameter and parameter.default)
    if isinstance(known, int):
        return known
    wanted = recorded_conditions(pipeline, recipe)[:1]
    return observe(pipeline, wanted, sampling_of(pipeline, recipe)).step_count()
