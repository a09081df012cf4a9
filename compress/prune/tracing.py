"""One call of a model, its graph cut behind every layer: what each layer's input is made of.

A layer's input is then made of the outputs of a few others, and of parameters of norms between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from diffpress.calibration.gradients import requiring_gradients
from diffpress.calibration.inputs import Inputs
from diffpress.calibration.sampling import Call, answer
from diffpress.export.runtime import Forward, Wrap

from ..data_flow import sample_tensors
from ..overlay import overlaid

SAMPLE = ""
"""Stands for the model's sample among the names of layers."""


class Source(NamedTuple):
    """Where a gradient arrives: an output of a layer, or a parameter of a module between layers."""

    module: str
    leaf: Tensor
    dimension: int
    """Of `leaf`: its rows, or its channels."""
    parameter: bool

    @property
    def channels(self) -> int:
        return self.leaf.shape[self.dimension]


@dataclass
class Traced:
    """One call of a model, cut behind every layer."""

    model: nn.Module
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    """What each layer was called with."""
    leaves: dict[int, Source] = field(default_factory=dict)
    """By the identity of what a gradient may arrive at."""
    behind_sample: set[str] = field(default_factory=lambda: {SAMPLE})
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def begin(self, value: Tensor, name: str, dimension: int) -> Tensor:
        """The beginning of a piece of the graph, in place of `value`.

        Noise: nothing flows through a neuron that is dead, or past a gate that is zero.
        """
        leaf = torch.randn(value.shape, generator=self.generator).to(value).requires_grad_()
        self.leaves[id(leaf)] = Source(name, leaf, dimension, False)
        # A copy: models add in place, which leaves of a graph refuse.
        return leaf.clone()

    def cut(self, name: str) -> Wrap:
        """Around the forward of the layer `name`."""

        def around(beneath: Forward) -> Forward:
            def forward(*arguments: Any, **options: Any) -> Tensor:
                if not arguments:
                    # What nobody can look at is no layer; units do not go through it.
                    return beneath(**options)
                x = arguments[0]
                self.inputs.setdefault(name, []).append(x)
                if {source.module for source in self.sources([x])} & self.behind_sample:
                    self.behind_sample.add(name)
                return self.begin(beneath(*arguments, **options), name, channels(self.model, name))

            return forward

        return around

    def sources(self, tensors: Sequence[Tensor]) -> list[Source]:
        """Everything that they are made of."""
        found: dict[int, Source] = {}
        waiting, seen = [x.grad_fn for x in tensors], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            source = self.leaves.get(id(getattr(node, "variable", None)))
            if source is not None:
                found[id(source.leaf)] = source
            waiting += [each for each, _ in node.next_functions]
        return list(found.values())


@contextmanager
def traced(model: nn.Module, call: Call) -> Iterator[Traced]:
    """The call, made anew; its graph is there while the context lasts."""
    trace = Traced(model)
    layers = {name for name, module in model.named_modules() if _is_layer(module)}
    between = [(name, module) for name, module in model.named_modules() if name not in layers]
    sample = {path: trace.begin(value, SAMPLE, 0) for path, value in sample_tensors(model, call).items()}
    inputs = Inputs.like(call.inputs, sample)
    learning = requiring_gradients(model.parameters(), True)
    with learning, overlaid(model, {name: trace.cut(name) for name in layers}), torch.enable_grad():
        for name, module in between:
            for parameter in module.parameters(recurse=False):
                trace.leaves[id(parameter)] = Source(name, parameter, 0, True)
        trace.output = answer(model, inputs, call.output.dtype)
        yield trace


def channels(model: nn.Module, name: str) -> int:
    """The dimension of channels of what a layer reads and writes."""
    return 1 if isinstance(model.get_submodule(name), _ConvNd) else -1


def _is_layer(module: nn.Module) -> bool:
    """What is between a layer and the next is what works on every channel by itself; a depthwise convolution does."""
    return isinstance(module, (nn.Linear, _ConvNd)) and not _is_depthwise(module)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels > 1
