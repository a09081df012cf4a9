"""What learns at a time: all layers together, or, where memory is short, one block of the denoiser after the other."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from diffpress.calibration.conditions import conditions
from diffpress.calibration.cost import peak_memory_bytes, weight_bytes
from diffpress.calibration.sampling import Call, Sampling, denoiser_of, device_of, sample, watch
from diffpress.compress.options import Order, Qalora
from diffpress.compress.qalora.blocks import find_blocks
from diffpress.compress.qalora.memory import learning_needs
from diffpress.export.errors import RecipeError

from .recipe import Recipe

DENOISERS = {"denoiser", "transformer", "unet"}
"""What a recipe calls the component that learns."""
SPARE = 0.9
"""Share of the free memory that learning may count on."""


def choose_order(pipeline: Any, recipe: Recipe) -> Order | None:
    """What the recipe says or, where it leaves that open, `whole` where the device has the memory for it.

    None where nothing is learned. Raises RecipeError where the recipe asks for blocks and the denoiser has none.
    """
    options = recipe.quantize
    if not isinstance(options, Qalora) or DENOISERS.isdisjoint(options.components):
        return None
    denoiser = denoiser_of(pipeline)
    if options.order == "blocks" and not find_blocks(denoiser):
        raise RecipeError(
            f"quantize.order: blocks needs a denoiser of repeated modules, and {type(denoiser).__name__} has none. Give "
            "whole; quantize.accumulate and quantize.checkpointing save memory too."
        )
    return options.order or _that_fits(learning_bytes(pipeline, recipe), free_bytes(pipeline))


def _that_fits(needed: dict[Order, int], free: int) -> Order:
    return "whole" if needed["whole"] <= SPARE * free or "blocks" not in needed else "blocks"


def with_order(recipe: Recipe, order: Order | None) -> Recipe:
    """The recipe with its order settled; as it was where nothing is learned."""
    if order is None or recipe.quantize is None:
        return recipe
    return recipe.model_copy(update={"quantize": recipe.quantize.model_copy(update={"order": order})})


def learning_bytes(pipeline: Any, recipe: Recipe) -> dict[Order, int]:
    """The most memory that each order takes, weights and the sampling of its own runs included; predicted, not measured."""
    options = recipe.quantize
    assert isinstance(options, Qalora)
    sampling = Sampling(2, recipe.sampling.guidance_scale)
    (condition,) = conditions(pipeline, recipe.record.prompts, 1, recipe.seed)
    calls: list[Call] = []
    with watch(pipeline, calls.append):
        sample(pipeline, [condition], sampling)
    weights = weight_bytes(pipeline)
    running = (peak_memory_bytes(pipeline, condition, sampling) - weights) * recipe.record.batch
    needs = learning_needs(denoiser_of(pipeline), calls[0], options)
    return {order: weights + own.state + max(own.graph, running) for order, own in needs.items()}


def free_bytes(pipeline: Any) -> int:
    """Memory of the pipeline's device that is free, or is taken by the pipeline itself."""
    device = device_of(denoiser_of(pipeline))
    if device.type == "cuda":
        return weight_bytes(pipeline) + torch.cuda.mem_get_info(device)[0]
    return weight_bytes(pipeline) + psutil.virtual_memory().available
