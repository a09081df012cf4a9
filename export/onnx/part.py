"""What becomes one ONNX file."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..portable.manifest import Port
from ..runtime import PackedLayer, attention_overrides, named_packed_layers


@dataclass(frozen=True)
class Input:
    """One input of a graph, and how to make an example of it."""

    name: str
    shape: tuple[int, ...]
    """Without the batch."""
    below: int | None = None
    """Whole numbers below this one; None for normal random numbers."""
    choices: tuple[float, ...] = ()
    """One of these numbers for the whole batch, which the input then does not have."""

    def example(self, batch: int, generator: torch.Generator) -> Tensor:
        """A random value."""
        if self.choices:
            return torch.tensor([self.choices[int(torch.randint(len(self.choices), (), generator=generator))]])
        if self.below is not None:
            return torch.randint(self.below, (batch, *self.shape), generator=generator)
        return torch.randn(batch, *self.shape, generator=generator)

    def port(self) -> Port:
        """How the manifest describes it."""
        shape = self.shape if self.choices else ("batch", *self.shape)
        return Port(name=self.name, dtype="float32" if self.below is None else "int64", shape=shape)


@dataclass(frozen=True)
class Part:
    """One graph of a pipeline before it is written: a module that takes `inputs` in their order and gives one tensor."""

    name: str
    module: nn.Module
    inputs: tuple[Input, ...]
    output: str

    def example(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random values of all inputs."""
        return {item.name: item.example(batch, generator) for item in self.inputs}


def packed_layers(module: nn.Module) -> list[PackedLayer]:
    """The layers that a Pack edit left in a module."""
    return [layer for _, layer in named_packed_layers(module)]


def multiplies_codes(part: Part) -> bool:
    """Whether a part has sums of products of integers."""
    rounds = any(layer.edit.activation_bits and not layer.edit.float8 for layer in packed_layers(part.module))
    return rounds or bool(attention_overrides(part.module))
