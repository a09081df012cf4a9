"""What becomes one ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..portable.manifest import Port
from ..runtime import INT8_MAX, PackedLayer, attention_overrides, named_packed_layers


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
    batched: bool = True
    """Whether the first axis is the batch; not with `choices`."""
    dtype: Literal["float32", "int8"] = "float32"
    """Of what is no whole number below another."""
    spread: float = 1.0
    """Standard deviation of normal random numbers."""

    @property
    def has_batch(self) -> bool:
        """Whether the first axis is the batch."""
        return self.batched and not self.choices

    def example(self, batch: int, generator: torch.Generator) -> Tensor:
        """A random value."""
        if self.choices:
            return torch.tensor([self.choices[int(torch.randint(len(self.choices), (), generator=generator))]])
        shape = (batch, *self.shape) if self.batched else self.shape
        if self.below is not None:
            return torch.randint(self.below, shape, generator=generator)
        if self.dtype == "int8":
            return torch.randint(-INT8_MAX, INT8_MAX + 1, shape, generator=generator, dtype=torch.int8)
        return self.spread * torch.randn(shape, generator=generator)

    def port(self) -> Port:
        """How the manifest describes it."""
        shape = ("batch", *self.shape) if self.has_batch else self.shape
        return Port(name=self.name, dtype=self.dtype if self.below is None else "int64", shape=shape)


class Size(NamedTuple):
    """What the error of an output is measured by, if not by the output."""

    of_sum: float | None = None
    """Root mean square of what it is a difference of."""
    held: float = 0.0
    """What rounding for holding it may add to its error, over that."""


@dataclass(frozen=True)
class Part:
    """One graph of a pipeline before it is written: a module that takes `inputs` in their order and gives one tensor, or a
    tuple of it and `more`."""

    name: str
    module: nn.Module
    inputs: tuple[Input, ...]
    output: str
    more: tuple[str, ...] = ()
    """What it gives behind its output."""
    sizes: Callable[[], Mapping[str, Size]] = dict
    """Of some of these, in the latest call."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """In the order in which they are given."""
        return self.output, *self.more

    def answer(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What torch gives, by name."""
        given = self.module(*inputs.values())
        return dict(zip(self.outputs, (given,) if isinstance(given, Tensor) else given, strict=True))

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
