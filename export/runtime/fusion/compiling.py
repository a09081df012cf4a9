"""torch.compile with norms and the codes after them in one pass."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..packed import PackedLayer
from .outcome import Fusions
from .rewrite import fuse_

Backend = Callable[[GraphModule, list[Tensor]], Callable[..., Any]]
REPEATED = ("ResnetBlock2D",)
"""Classes of repeated modules beside those that diffusers names (`_repeated_blocks`)."""


def compile_(
    denoiser: nn.Module,
    backend: str | Backend = "inductor",
    *,
    regional: bool = False,
    dynamic: bool | None = None,
    fullgraph: bool = False,
) -> Fusions:
    """Have `denoiser` compiled by its next call, with norms fused into the packed layers they feed; returns the outcome.

    `backend` is one of torch.compile's, by name or as a function, and gets the rewritten graphs. `regional`: repeated
    blocks are compiled, each kind once, and what is around them is not, which takes seconds instead of minutes. Of a
    dictionary of denoisers each is compiled.
    """
    whole = dict(denoiser.items()) if isinstance(denoiser, nn.ModuleDict) else {"": denoiser}
    regions = regions_of(denoiser) if regional else whole
    fusions = Fusions(denoiser, regions)
    compile_regions_(regions.values(), fusing(denoiser, fusions, backend), dynamic=dynamic, fullgraph=fullgraph)
    return fusions


def compile_regions_(
    regions: Collection[nn.Module],
    backend: str | Backend = "inductor",
    *,
    dynamic: bool | None = None,
    fullgraph: bool = False,
) -> None:
    """Have each of `regions` compiled by its next call, those that are alike once."""
    # Blocks of one class share their code, and each size of them is one more compilation of it.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, len(regions))
    for region in regions:
        region.compile(backend=backend, dynamic=dynamic, fullgraph=fullgraph)


def regions_of(denoiser: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a denoiser that repeat, by name; the denoiser itself where none is known."""
    classes = (*REPEATED, *(getattr(denoiser, "_repeated_blocks", None) or ()))
    found = {name: module for name, module in denoiser.named_modules() if type(module).__name__ in classes}
    return found or {"": denoiser}


def fusing(denoiser: nn.Module, fusions: Fusions, backend: str | Backend) -> Backend:
    """A backend that rewrites graphs of `denoiser`, or of parts of it, adds the outcome, and hands them on to `backend`."""

    def rewrite_and_compile(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        weights = {id(layer.weight): name for name, layer in denoiser.named_modules() if isinstance(layer, PackedLayer)}
        given = dict(zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True))

        def name_of(weight: Node) -> str:
            return weights.get(id(given.get(weight)), weight.name)

        fusions.add(fuse_(graph, name_of))
        return _looked_up(backend)(graph, inputs)

    return rewrite_and_compile


def _looked_up(backend: str | Backend) -> Backend:
    if not isinstance(backend, str):
        return backend
    # Imported when a graph is compiled: it takes seconds.
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(backend)
