"""Which attentions of a denoiser are computed on integers, and how a student learns through them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpress.calibration.sampling import replay
from diffpress.calibration.trajectory import Trajectories
from diffpress.export.runtime import Int8Attention, computes_attention, why_not_int8
from diffpress.kernels import int8_attention

from .options import Products, Rounding
from .overlay import overlaid, overriding_attention
from .sensitivity import evaluation_calls, measure_attention


@dataclass(frozen=True)
class AttentionChoice:
    """What becomes of the attention of one module."""

    shape: tuple[int, ...] = ()
    """Heads, and the columns of each; empty where no call was seen."""
    products: Products = "none"
    reason: str = ""
    """Why fewer products are of integers than asked."""
    error: float | None = None
    """Relative squared error of the denoiser's output with only these products of integers; those that were tried first
    where none are."""


def choose_attention(
    denoiser: nn.Module, trajectories: Trajectories, options: Rounding, layers: Mapping[str, float], seed: int
) -> dict[str, AttentionChoice]:
    """What becomes of every attention, nothing where no integers are asked for; `layers` are the errors of rounded layers.

    Products stay in float where they err more than the layers do in the mean. As there are four layers and more to an
    attention, all attentions then add no more than a quarter to what the layers err.
    """
    if options.attention == "none":
        return {}
    choices = _observe(denoiser, trajectories)
    for name, choice in choices.items():
        if any(fnmatchcase(f"{name}.processor", pattern) for pattern in options.keep):
            choices[name] = replace(choice, reason="kept by the recipe")
    possible = [name for name, choice in choices.items() if not choice.reason]
    ways: tuple[Products, ...] = ("all", "scores") if options.attention == "all" else ("scores",)
    attention = {name: [Int8Attention(way == "all") for way in ways] for name in possible}
    limit = sum(layers.values()) / max(1, len(layers))
    for name, errors in measure_attention(denoiser, attention, trajectories, seed).items():
        choices[name] = _choice(choices[name], dict(zip(ways, errors, strict=True)), limit)
    return choices


def _choice(seen: AttentionChoice, errors: Mapping[Products, float], limit: float) -> AttentionChoice:
    """The first of the products asked for, in falling order, whose error is at most `limit`."""
    wanted = next(iter(errors))
    for products, error in errors.items():
        if error <= limit:
            reason = "" if products == wanted else "sensitive: softmax·V stays in float"
            return replace(seen, products=products, error=error, reason=reason)
    return replace(seen, error=errors[wanted], reason="sensitive: stays in float")


def _observe(denoiser: nn.Module, trajectories: Trajectories) -> dict[str, AttentionChoice]:
    """The shape of every attention, and the reason where it cannot be computed on integers."""
    names = [name for name, module in denoiser.named_modules() if computes_attention(module)]
    seen = {name: AttentionChoice(reason="no call of its attention was seen while recording") for name in names}
    refused: dict[str, str] = {}

    def watch(name: str) -> Any:
        def attend(query: Tensor, *arguments: Any, **options: Any) -> Tensor:
            seen[name] = AttentionChoice((query.shape[1], query.shape[-1]))
            reason = why_not_int8(query, *arguments, **options)
            if reason is not None:
                refused.setdefault(name, reason)
            return F.scaled_dot_product_attention(query, *arguments, **options)

        return attend

    with overlaid(denoiser, overriding_attention({name: watch(name) for name in names})):
        for call in evaluation_calls(trajectories):
            replay(denoiser, call)
    return {name: replace(own, reason=refused.get(name, own.reason)) for name, own in seen.items()}


def learnable(choices: Mapping[str, AttentionChoice]) -> dict[str, Int8Attention]:
    """What answers, with gradients, for the attentions that are computed on integers."""
    return {
        name: Int8Attention(choice.products == "all", straight_through_attention)
        for name, choice in choices.items()
        if choice.products != "none"
    }


def straight_through_attention(query: Tensor, key: Tensor, value: Tensor, integer_values: bool) -> Tensor:
    """`int8_attention` with the gradients of attention in floats: rounding passes them straight through."""
    result = _StraightThrough.apply(query, key, value, integer_values)
    assert isinstance(result, Tensor)
    return result


class _StraightThrough(torch.autograd.Function):
    """Keeps its inputs only; attention is computed again, in floats, on the way back."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, integer_values: bool) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return int8_attention(query, key, value, integer_values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        with torch.enable_grad():
            given = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            output = F.scaled_dot_product_attention(*given)
        for_query, for_key, for_value = torch.autograd.grad(output, given, gradients)
        return for_query, for_key, for_value, None
