"""Which layers a denoiser begins and ends with, told by where its data flows in one recorded call."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from diffpress.calibration.inputs import Inputs
from diffpress.calibration.sampling import Call, answer
from diffpress.export.runtime import Forward, Wrap

from .overlay import frozen, overlaid

WEIGHTED = (nn.Linear, _ConvNd)
"""What ends a direct connection; a norm between two layers does not."""
SAMPLE = ""
"""Stands for the denoiser's sample among the names of layers."""


def edge_layers(denoiser: nn.Module, call: Call) -> dict[str, str]:
    """`first` for layers that read the sample itself, and `last` for those whose output nothing but the result reads.

    Not by the order in which layers are registered or called: embeddings of the time step and of captions come first there.
    What is called with another input than the sample has no such layers.
    """
    sample = sample_tensors(denoiser, call)
    if not sample:
        return {}
    flow = _Flow()
    inputs = Inputs.like(call.inputs, {path: flow.begin(value, SAMPLE) for path, value in sample.items()})
    layers = [name for name, module in denoiser.named_modules() if isinstance(module, WEIGHTED)]
    # The graph alone counts: nothing is kept of what a backward pass would need.
    nothing = torch.empty(0)
    forgetting = torch.autograd.graph.saved_tensors_hooks(lambda _: nothing, lambda _: nothing)
    with (
        overlaid(denoiser, {name: flow.cut(name) for name in layers}),
        frozen(denoiser),
        forgetting,
        torch.enable_grad(),
    ):
        output = answer(denoiser, inputs, call.output.dtype)
    last = flow.directly_behind(output) - flow.read
    return dict.fromkeys(last - {SAMPLE}, "last") | dict.fromkeys(flow.first, "first")


def first_argument(denoiser: nn.Module) -> str:
    """What a denoiser calls the sample: those of diffusers take it first."""
    return next(iter(inspect.signature(denoiser.forward).parameters))


def sample_tensors(denoiser: nn.Module, call: Call) -> dict[str, Tensor]:
    """The sample of a call, by path: several where a denoiser takes a list; none where it is no floats."""
    paths = Inputs.like(call.inputs).within(first_argument(denoiser))
    return {path: call.inputs[path] for path in paths if call.inputs[path].is_floating_point()}


class _Flow:
    """Autograd's graph of one call, cut behind every layer: what is still connected is connected directly."""

    def __init__(self) -> None:
        self.first: set[str] = set()
        self.read: set[str] = set()
        """What some layer's input is made of: names of layers, or SAMPLE."""
        self.behind_sample = {SAMPLE}
        """What the sample has a part in, through whatever layers."""
        self.names: dict[int, str] = {}
        """By the identity of a tensor that begins a piece of the graph."""
        self.kept: list[Tensor] = []
        self.sources: dict[Any, frozenset[str]] = {}

    def begin(self, value: Tensor, name: str) -> Tensor:
        """`value` as the beginning of a piece of the graph."""
        leaf = value.detach().requires_grad_()
        self.kept.append(leaf)
        self.names[id(leaf)] = name
        # A copy: models add in place, which leaves of a graph refuse.
        return leaf.clone()

    def cut(self, name: str) -> Wrap:
        """Around the forward of the layer `name`."""

        def around(beneath: Forward) -> Forward:
            def forward(x: Tensor) -> Tensor:
                sources = self._sources(x)
                if sources:
                    self.behind_sample.add(name)
                if sources == {SAMPLE}:
                    self.first.add(name)
                return self.begin(beneath(x), name)

            return forward

        return around

    def _sources(self, x: Tensor) -> frozenset[str]:
        """Whether `x` is made of the SAMPLE, of layers that the sample has a part in (all under one name), or of both.

        Each node of the graph is looked at once, however many layers read what it made.
        """
        waiting = [x.grad_fn]
        while waiting:
            node = waiting[-1]
            beneath = _beneath(node)
            left = [each for each in beneath if each not in self.sources]
            if left:
                waiting += left
                continue
            waiting.pop()
            self.sources[node] = frozenset().union(*(self.sources[each] for each in beneath), self._source(node))
        return self.sources[x.grad_fn]

    def _source(self, node: Any) -> set[str]:
        name = self._name(node)
        if name is None:
            return set()
        self.read.add(name)
        return {name if name == SAMPLE else "layer"} if name in self.behind_sample else set()

    def directly_behind(self, output: Tensor) -> set[str]:
        """The names of everything that `output` is made of."""
        waiting, seen = [output.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += _beneath(node)
        return {name for node in seen if (name := self._name(node)) is not None}

    def _name(self, node: Any) -> str | None:
        return self.names.get(id(getattr(node, "variable", None)))


def _beneath(node: Any) -> list[Any]:
    """The nodes whose values went into that of `node`, which may be None."""
    return [] if node is None else [each for each, _ in node.next_functions if each is not None]
