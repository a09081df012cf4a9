"""What learns at a time: all layers together, or, where memory is short, one block of the denoiser after the other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from diffpress.calibration.cost import SPARE, free_bytes, peak_memory_bytes, weight_bytes
from diffpress.calibration.sampling import Call, denoiser_of, sample, watch
from diffpress.calibration.shortest import shortest
from diffpress.export.errors import RecipeError

from ..options import Order, Qalora
from ..stage import Subject
from .blocks import find_blocks
from .memory import learning_needs


def settle_order(subject: Subject, options: Qalora, folder: Path) -> Order:
    """The order that learning in `folder` began in, else that of `choose_order`: what memory is free changes in between."""
    path = folder / "order.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(choose_order(subject, options)), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def choose_order(subject: Subject, options: Qalora) -> Order:
    """What the recipe says or, where it leaves that open, `whole` where the device has the memory for it."""
    return options.order or fitting_order(subject, learning_bytes(subject, options))


def fitting_order(subject: Subject, needed: Mapping[Order, int]) -> Order:
    """`whole` where the device has the memory that is `needed` for it, or where there is no other."""
    fits = needed["whole"] <= SPARE * free_bytes(subject.pipeline)
    return "whole" if fits or "blocks" not in needed else "blocks"


def check_order(denoiser: nn.Module, options: Qalora) -> None:
    """Raises RecipeError where the recipe asks for blocks and the denoiser has none."""
    if options.order == "blocks" and not find_blocks(denoiser):
        raise RecipeError(
            f"quantize.order: blocks needs a denoiser of repeated modules, and {type(denoiser).__name__} has none. Give "
            "whole; quantize.accumulate and quantize.checkpointing save memory too."
        )


def learning_bytes(subject: Subject, options: Qalora) -> dict[Order, int]:
    """The most memory that each order takes, weights and the sampling of rollouts included; predicted, not measured."""
    pipeline, (condition,) = subject.pipeline, subject.conditions(1)
    sampling = shortest(pipeline, condition, subject.sampling)
    calls: list[Call] = []
    with watch(pipeline, calls.append):
        sample(pipeline, [condition], sampling)
    weights = weight_bytes(pipeline)
    running = (peak_memory_bytes(pipeline, condition, sampling) - weights) * subject.batch
    needs = learning_needs(denoiser_of(pipeline), calls[0], options)
    return {order: weights + own.state + max(own.graph, running) for order, own in needs.items()}
