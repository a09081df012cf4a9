"""The one place that decides which packed layers run in floats: those that this machine runs faster so, as memory allows.

A packed layer may lose to one that was never packed, by its kind, its shape and the processor. Its weights are then expanded
once, when it is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from diffpress.kernels.library import CHOICE, only_reference
from diffpress.kernels.processor import fast_dtype

from .forms import LayerForm, LayerUse, form_of
from .memory import CPU, free_bytes
from .packed import PackedLayer
from .times import Times, layer_times

SLOWER = 1.05
"""Times of floats that a packed layer may take before it is expanded: less is noise, and packed it takes less memory."""
SHARE = 0.5
"""Of the memory that is free, for expanded weights; the rest is for what is computed with them."""


class Candidate(NamedTuple):
    """What is known of a packed layer that could be expanded."""

    form: LayerForm
    calls: int
    """While one image is made."""
    size_bytes: int
    """What its weights take in floats."""


@dataclass(frozen=True)
class Expansion:
    """What becomes of the packed layers of a pipeline on this machine, and why."""

    candidates: Mapping[str, Candidate]
    times: Mapping[LayerForm, Times]
    expanded: frozenset[str]
    others: int = 0
    """Packed layers that nothing is known of, and embeddings: they stay packed."""
    reason: str = ""
    """Why nothing was to be decided, where that is so."""

    @property
    def size_bytes(self) -> int:
        """What is taken beside what is stored."""
        return sum(self.candidates[name].size_bytes for name in self.expanded)

    @property
    def count(self) -> int:
        """Of all packed layers."""
        return len(self.candidates) + self.others

    def words(self, name: str) -> str:
        """What the plan says of one layer that loses to floats; empty of others."""
        form = self.candidates[name].form if name in self.candidates else None
        if form is None or form not in self.times or not loses(self.times[form]):
            return ""
        packed, floats = self.times[form]
        done = "expanded at load" if name in self.expanded else "too little memory to expand it"
        return f"here {packed:.3g} ms packed, {floats:.3g} ms in floats ({form.words()}): {done}"


def loses(times: Times) -> bool:
    """Whether a form is faster in floats."""
    return times.packed_ms > SLOWER * times.floats_ms


def choose(candidates: Mapping[str, Candidate], times: Mapping[LayerForm, Times], budget_bytes: int) -> frozenset[str]:
    """The layers to expand: of those that lose to floats as many as fit, those that save the most time a byte first."""

    def saved_ms(name: str) -> float:
        own = candidates[name]
        return own.calls * (times[own.form].packed_ms - times[own.form].floats_ms) / own.size_bytes

    chosen, left = set(), budget_bytes
    for name in sorted(
        (name for name in candidates if loses(times[candidates[name].form])), key=saved_ms, reverse=True
    ):
        if candidates[name].size_bytes <= left:
            chosen.add(name)
            left -= candidates[name].size_bytes
    return frozenset(chosen)


def why_not(device: torch.device, stays: bool) -> str:
    """Why layers on a device are left as they are; empty where they need not be. `stays`: nobody will move them."""
    if only_reference():
        return f"{CHOICE}=reference asks for what the references answer"
    if device.type not in ("cpu", "cuda"):
        return f"layers are not timed on {device.type}"
    moved = device.type == "cpu" and not stays and torch.accelerator.is_available()
    return "there is a GPU, where pipelines are moved to (`load` takes a device)" if moved else ""


def decide(
    layers: Mapping[str, PackedLayer],
    uses: Mapping[str, LayerUse],
    dtype: torch.dtype,
    held_bytes: int = 0,
    device: torch.device = CPU,
    stays: bool = False,
) -> Expansion:
    """What to do with `layers` on a `device`, where they stay or from where they may be moved, loaded in `dtype`.

    Their `uses` are known; `held_bytes` are still to be loaded.
    """
    size = (fast_dtype(torch.empty(0, dtype=dtype)) if device.type == "cpu" else dtype).itemsize
    candidates = {
        name: Candidate(form, uses[name].calls, size * math.prod(layer.float_shape))
        for name, layer in layers.items()
        if name in uses and (form := form_of(layer, uses[name], dtype)) is not None
    }
    others, reason = len(layers) - len(candidates), why_not(device, stays)
    if reason:
        return Expansion(candidates, {}, frozenset(), others, reason)
    times = layer_times((own.form for own in candidates.values()), device)
    budget = int(SHARE * max(0, free_bytes(device) - held_bytes))
    return Expansion(candidates, times, choose(candidates, times, budget), others)


def expand_(pipeline: Any, uses: Mapping[str, LayerUse], stays: bool = False) -> Expansion:
    """Expand the layers of a loaded `pipeline` that are faster so where it is, and where it `stays` if that is the CPU."""
    layers = dict(layers_of(pipeline))
    device = next((layer.weight.device for layer in layers.values()), CPU)
    expansion = decide(layers, uses, pipeline.dtype, device=device, stays=stays)
    for name in expansion.expanded:
        layers[name].expand_(pipeline.dtype)
    return expansion


def layers_of(pipeline: Any) -> Iterator[tuple[str, PackedLayer]]:
    """The packed layers of all components of a pipeline, named `COMPONENT.MODULE`."""
    for component, model in pipeline.components.items():
        if isinstance(model, nn.Module):
            yield from named_packed_layers(model, f"{component}.")


def named_packed_layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, PackedLayer]]:
    """Those of one model, with `prefix` before their names."""
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLayer):
            yield prefix + name, layer
