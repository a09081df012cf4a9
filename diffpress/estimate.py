"""What a `compress` will take, before anything is started."""

from __future__ import annotations

import inspect
import time
from math import ceil
from typing import Any

from diffpress.calibration.conditions import Condition, conditions
from diffpress.calibration.cost import peak_memory_bytes, weight_bytes
from diffpress.calibration.observe import SHARDS
from diffpress.calibration.sampling import Call, Sampling, sample, watch
from diffpress.compress.options import Qalora
from diffpress.compress.qalora.train import EVALUATIONS, evaluate_every
from diffpress.compress.qalora.training_data import images_per_round
from diffpress.export.artifact import open_pipeline
from diffpress.export.folder import PipelineFolder

from .order import choose_order, learning_bytes
from .recipe import Recipe

REPLAYS = 4
"""Passes of quantization over what was recorded, the search counted for its extra work."""
IMAGES = 48
"""Images that measuring makes, those for the timings included."""
LEARNING = 5
"""What learning from a call takes, over what the call itself takes: forwards, backwards, and the rounding in both."""
ROLLOUT_CONDITIONS = 512
"""Different conditions that a student may sample while it learns."""
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
    return sum(sizes) * _steps(pipeline, recipe) * recipe.record.trajectories


def recorded_conditions(pipeline: Any, recipe: Recipe) -> list[Condition]:
    """What is recorded; its seeds are apart from those that results are reported on, which count up from the recipe's own."""
    return conditions(pipeline, recipe.record.prompts, recipe.record.trajectories, recipe.seed + 2**31)


def rollout_conditions(pipeline: Any, recipe: Recipe) -> list[Condition]:
    """What a student samples while it learns: texts from where recording stopped on, with seeds of their own."""
    recorded = recipe.record.trajectories
    return conditions(pipeline, recipe.record.prompts, recorded + ROLLOUT_CONDITIONS, recipe.seed + 2**32)[recorded:]


def estimate(source: PipelineFolder, recipe: Recipe, device: str = "cpu") -> dict[str, Any]:
    """Seconds, disk and memory of a `compress`, from one timed step of each kind; nothing is written."""
    pipeline = open_pipeline(source).to(device)
    sampling = Sampling(2, recipe.sampling.guidance_scale)
    wanted = recorded_conditions(pipeline, recipe)[: recipe.record.batch]
    recorded = recorded_bytes(pipeline, recipe)
    start = time.perf_counter()
    sample(pipeline, wanted, sampling)
    seconds_a_step = (time.perf_counter() - start) / 2
    steps = _steps(pipeline, recipe)
    seconds_a_run = seconds_a_step * steps
    weights = weight_bytes(pipeline)
    return {
        "steps": steps,
        "seconds": {
            "record": seconds_a_run * ceil(recipe.record.trajectories / recipe.record.batch),
            "quantize": seconds_a_run * REPLAYS * min(SHARDS, ceil(recipe.record.trajectories / recipe.record.batch)),
            **_learning_seconds(recipe, seconds_a_step, steps),
            "measure": seconds_a_step * steps * ceil(IMAGES / recipe.record.batch),
        },
        "disk_bytes": recorded + needed_bytes(source),
        "memory_bytes": (peak_memory_bytes(pipeline, wanted[0], sampling) - weights) * len(wanted) + weights,
        **_learning_memory(pipeline, recipe),
    }


def _learning_memory(pipeline: Any, recipe: Recipe) -> dict[str, Any]:
    """What each order of learning takes, and the one that is taken, where the recipe asks for learning."""
    order = choose_order(pipeline, recipe)
    return {} if order is None else {"learning_bytes": learning_bytes(pipeline, recipe), "order": order}


def _learning_seconds(recipe: Recipe, seconds_a_step: float, steps: int) -> dict[str, float]:
    """Time of learning, where the recipe asks for it."""
    options = recipe.quantize
    if not isinstance(options, Qalora):
        return {}
    seconds_a_picture = seconds_a_step / recipe.record.batch
    images = images_per_round(evaluate_every(options.iterations), options.batch, steps)
    rounds = EVALUATIONS * options.rollout_share * 2 * images + (EVALUATIONS + 2) * options.validation_images
    learned = options.iterations * options.batch * LEARNING
    return {"learn": seconds_a_picture * (learned + rounds * steps)}


def _steps(pipeline: Any, recipe: Recipe) -> int:
    default = inspect.signature(type(pipeline).__call__).parameters["num_inference_steps"].default
    return recipe.sampling.steps or int(default)
