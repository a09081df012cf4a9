"""What a `compress` will take, before anything is started."""

from __future__ import annotations

import time
from math import ceil
from typing import Any

from diffpress.calibration.conditions import conditions
from diffpress.calibration.cost import peak_memory_bytes, weight_bytes
from diffpress.calibration.sampling import Call, Sampling, sample, watch
from diffpress.export.artifact import load_pipeline
from diffpress.export.folder import PipelineFolder

from .recipe import Recipe

REPLAYS = 3
"""Passes of quantization over what was recorded, the costlier second one counted double."""
PAIRS = 32
"""Pictures that measuring makes."""
REPORT_BYTES = 8_000_000


def needed_bytes(source: PipelineFolder, recipe: Recipe) -> int:
    """Disk that is certainly needed: the artifact is at most as large as its source, and so is what stands in for it."""
    return source.size_bytes() + REPORT_BYTES


def estimate(source: PipelineFolder, recipe: Recipe) -> dict[str, Any]:
    """Seconds, disk and memory of a `compress`, from one timed step of each kind; nothing is written."""
    source.check()
    pipeline = load_pipeline(source)
    sampling = Sampling(2, recipe.sampling.guidance_scale)
    wanted = conditions(pipeline, recipe.record.prompts, min(recipe.record.batch, recipe.record.trajectories), 0)
    bytes_a_call: list[int] = []

    def receive(call: Call) -> None:
        tensors = [*call.inputs.values(), call.output]
        bytes_a_call.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    sample(pipeline, wanted[:1], sampling)
    with watch(pipeline, receive):
        start = time.perf_counter()
        sample(pipeline, wanted, sampling)
        seconds_a_step = (time.perf_counter() - start) / 2
    steps = recipe.sampling.steps or _default_steps(pipeline)
    shards = ceil(recipe.record.trajectories / recipe.record.batch)
    record_seconds = seconds_a_step * steps * shards
    measure_seconds = seconds_a_step * steps * ceil(PAIRS / recipe.record.batch) * 2
    recorded = bytes_a_call[0] * len(bytes_a_call) // 2 * steps * shards
    return {
        "steps": steps,
        "seconds": {
            "record": record_seconds,
            "quantize": record_seconds * (REPLAYS + 1) if recipe.quantize else 0.0,
            "measure": measure_seconds,
        },
        "disk_bytes": recorded + needed_bytes(source, recipe),
        "memory_bytes": peak_memory_bytes(pipeline, wanted[0], sampling) * 2 + weight_bytes(pipeline),
    }


def _default_steps(pipeline: Any) -> int:
    import inspect

    return int(inspect.signature(type(pipeline).__call__).parameters["num_inference_steps"].default)
