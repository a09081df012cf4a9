"""A whole sampling run of the real pipeline with the graph attached: what end-to-end learning descends along."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffpress.export.runtime import NOTHING, own_forward

from .conditions import Condition
from .probe import OTHER_SCHEDULER, check_gradients, check_learning, refuse
from .sampling import (
    Sampling,
    call_arguments,
    denoiser_of,
    denoisers_of,
    drawing,
    groups_of,
    pixels_as_latents,
    watch_decoder,
)
from .tracing import Place

_DIFFERENTIABLE: WeakKeyDictionary[Any, set[Hashable]] = WeakKeyDictionary()
"""Per pipeline, under what gradients were found to go through it."""


def sample_with_gradients(pipeline: Any, conditions: Sequence[Condition], sampling: Sampling) -> Tensor:
    """`sample(...).latents` [N, ...], to the bit, with the graph of the whole run attached.

    Gradients go to the denoiser, and what is laid around it, as far as that requires one. Inside `checkpoint_steps`
    activations take the memory of one call. Raises UnsupportedModelError, before any sampling, where a part of the pipeline
    lets no gradient through, and names it.
    """
    known, here = _DIFFERENTIABLE.setdefault(pipeline, set()), _circumstances(pipeline, sampling)
    if here not in known:
        check_gradients(pipeline, lambda: _sampled(pipeline, conditions[:1], sampling))
        known.add(here)
    groups = groups_of(pipeline, conditions, sampling, len(conditions))
    latents = torch.cat([_sampled(pipeline, group, sampling) for group in groups])
    check_learning(pipeline, latents.requires_grad)
    return latents


def _circumstances(pipeline: Any, sampling: Sampling) -> Hashable:
    """What decides through what gradients have to go, the overlays' places among it."""
    denoiser, scheduler = denoiser_of(pipeline), getattr(pipeline, "scheduler", None)
    overlaid = frozenset(name for name, module in denoiser.named_modules() if own_forward(module) is not NOTHING)
    return type(scheduler), str(getattr(scheduler, "config", "")), type(denoiser), overlaid, sampling


class _Sampled(BaseException):
    """All latents are there: no error, and nothing that a pipeline catches."""


@torch.enable_grad()
def _sampled(pipeline: Any, conditions: Sequence[Condition], sampling: Sampling) -> Tensor:
    # diffusers decorates the call with torch.no_grad, which keeps the original.
    call = inspect.unwrap(type(pipeline).__call__)
    seen: list[Tensor] = []

    def receive(latents: Tensor) -> None:
        seen.append(latents)
        # Some pipelines decode a few at a time.
        if sum(map(len, seen)) >= len(conditions):
            raise _Sampled

    pixels = _Pixels()
    converting = pixels if getattr(pipeline, "vae", None) is None else nullcontext()
    others_frozen = requiring_gradients(_other_weights(pipeline), False)
    watched = watch_decoder(pipeline, receive)
    with others_frozen, watched, drawing(pipeline, conditions), converting, suppress(_Sampled):
        images = call(pipeline, **call_arguments(pipeline, conditions, sampling)).images
        return torch.cat(seen) if seen else pixels_as_latents(pixels.tensor_of(pipeline, images))
    return torch.cat(seen)


@contextmanager
def requiring_gradients(weights: Iterable[Tensor], wanted: bool) -> Iterator[None]:
    """These weights require gradients while the context lasts, or do not."""
    others = {weight for weight in weights if weight.requires_grad != wanted}
    for weight in others:
        weight.requires_grad_(wanted)
    try:
        yield
    finally:
        for weight in others:
            weight.requires_grad_(not wanted)


def _other_weights(pipeline: Any) -> set[nn.Parameter]:
    """Of all parts but the denoiser: text encoders would keep a graph, and T5 whose weights require a gradient attends by
    another kernel, with other last bits.
    """
    modules = [part for part in getattr(pipeline, "components", {}).values() if isinstance(part, nn.Module)]
    learning = {weight for part in denoisers_of(pipeline).values() for weight in part.parameters()}
    return {weight for part in modules for weight in part.parameters()} - learning


class _Pixels(TorchFunctionMode):
    """Lets a pipeline without a decoder turn what has a gradient into numpy, and tells what an array was made from."""

    def __init__(self) -> None:
        super().__init__()
        self.converted: list[tuple[Tensor, np.ndarray[Any, Any], Place]] = []

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[Any],
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is not Tensor.numpy or not arguments[0].requires_grad:
            return function(*arguments, **(options or {}))
        with torch._C.DisableTorchFunction():
            array = arguments[0].detach().numpy()
        self.converted.append((arguments[0], array, Place.now(function)))
        return array

    def tensor_of(self, pipeline: Any, images: np.ndarray[Any, Any]) -> Tensor:
        """What `images` [N, H, W, C] were; what has no gradient is as it is. Raises UnsupportedModelError where anything else
        was taken out of torch.
        """
        for _, array, place in self.converted:
            if not np.may_share_memory(array, images):
                refuse(pipeline, f"{place} lets none through", OTHER_SCHEDULER)
        return self.converted[-1][0] if self.converted else torch.from_numpy(images)
