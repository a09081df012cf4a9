"""What a `compress` will take, before anything is started."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from math import ceil
from typing import Any

from diffpress.calibration.cost import peak_memory_bytes, weight_bytes
from diffpress.calibration.sampling import Call, Sampling, sample, watch
from diffpress.compress.stage import Cost, Running
from diffpress.export.artifact import open_pipeline
from diffpress.export.folder import PipelineFolder

from .recipe import Recipe
from .stages import Stage, component_forms, recorded_conditions, stages_of

IMAGES = 48
"""Images that measuring makes, those for the timings included."""
REPORT_BYTES = 8_000_000


def needed_bytes(source: PipelineFolder) -> int:
    """Disk that the artifact may take: it is at most as large as its source."""
    return source.size_bytes() + REPORT_BYTES


def recorded_bytes(pipeline: Any, recipe: Recipe) -> int:
    """Disk that the recorded trajectories will take, from one step of one of them."""
    sizes: list[int] = []

    def receive(call: Call) -> None:
        tensors = [*call.inputs.values(), call.output]
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    with watch(pipeline, receive):
        sample(pipeline, recorded_conditions(pipeline, recipe)[:1], Sampling(1, recipe.sampling.guidance_scale))
    return sum(sizes) * steps_of(pipeline, recipe) * recipe.record.trajectories


def estimate(source: PipelineFolder, recipe: Recipe, device: str = "cpu") -> dict[str, Any]:
    """Seconds, disk and memory of a `compress`, from one timed step of each kind; nothing is written."""
    forms = component_forms(source, recipe)
    pipeline = open_pipeline(source).to(device)
    stages = stages_of(source, pipeline, recipe, forms)
    sampling, batch = Sampling(2, recipe.sampling.guidance_scale), recipe.record.batch
    wanted = recorded_conditions(pipeline, recipe)[:batch]
    recorded = recorded_bytes(pipeline, recipe)
    start = time.perf_counter()
    sample(pipeline, wanted, sampling)
    batches = ceil(recipe.record.trajectories / batch)
    running = Running(steps_of(pipeline, recipe), (time.perf_counter() - start) / 2, batches)
    costs = costs_of(stages, running)
    weights, run_seconds = weight_bytes(pipeline), running.step_seconds * running.steps
    return {
        "steps": running.steps,
        "seconds": {
            "record": run_seconds * batches,
            **{name: seconds for cost in costs for name, seconds in cost.seconds.items()},
            "measure": run_seconds * ceil(IMAGES / batch),
        },
        "disk_bytes": recorded + needed_bytes(source) + sum(cost.disk_bytes for cost in costs),
        "memory_bytes": (peak_memory_bytes(pipeline, wanted[0], sampling) - weights) * len(wanted) + weights,
        **{name: value for cost in costs for name, value in cost.details.items()},
    }


def costs_of(stages: Sequence[Stage], running: Running) -> list[Cost]:
    """What each stage takes beside."""
    return [stage.method.estimate(stage.subject, stage.options, running) for stage in stages]


def steps_of(pipeline: Any, recipe: Recipe) -> int:
    """Sampling steps of one image."""
    default = inspect.signature(type(pipeline).__call__).parameters["num_inference_steps"].default
    return recipe.sampling.steps or int(default)
