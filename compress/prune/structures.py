"""What can be removed from a model as one: heads of an attention, neurons of a feed-forward, channels of a resnet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from diffpress.export.edits import Resize
from diffpress.export.edits.resize import Run, runs_of

from ..options import Removable

Removed = Mapping[str, Sequence[int]]
"""Units that go, by the names of structures."""


class Span(NamedTuple):
    """Places of units behind each other: unit u has `width` of them from `start + u * width` on."""

    start: int
    width: int

    def of(self, unit: int) -> range:
        """The places of one unit."""
        first = self.start + unit * self.width
        return range(first, first + self.width)


@dataclass(frozen=True)
class Part:
    """What one module has of the units."""

    module: str
    spans: tuple[Span, ...] = ()
    """Of its outputs, where it writes units, or of its inputs, where it reads them."""
    attributes: tuple[str, ...] = ()
    """Numbers that shrink in proportion to the units."""

    def places(self, units: Iterable[int]) -> list[int]:
        """Outputs or inputs that are of these units."""
        return sorted(place for unit in units for span in self.spans for place in span.of(unit))


@dataclass(frozen=True)
class Structure:
    """Units of which each can be removed without a change to any other part of the model."""

    name: str
    """The module that they are in, such as `transformer_blocks.0.attn1`; a number behind it where it has several kinds."""
    kind: Removable
    count: int
    """How many units there are."""
    writers: tuple[Part, ...]
    """Modules with rows of their own for each unit."""
    readers: tuple[Part, ...]
    """Layers with columns of their own for each unit: what they add up is all that anybody sees of it."""
    owners: tuple[Part, ...] = ()
    """Modules that know how many units there are."""

    def parameters(self, model: nn.Module) -> int:
        """That one unit takes."""
        rows = sum(
            len(part.places([0])) * tensor[0].numel()
            for part in self.writers
            for tensor in model.get_submodule(part.module).parameters(recurse=False)
        )
        return rows + sum(len(columns(model, part, [0])) * _outputs(model, part) for part in self.readers)


def columns(model: nn.Module, reader: Part, units: Iterable[int]) -> list[int]:
    """Columns of a reader's weight [out, in * taps] that are of these units."""
    taps = model.get_submodule(reader.module).weight[0, 0].numel()  # type: ignore[union-attr, operator, index]
    return [place * taps + tap for place in reader.places(units) for tap in range(taps)]


def _outputs(model: nn.Module, reader: Part) -> int:
    return len(model.get_submodule(reader.module).weight)  # type: ignore[arg-type]


def resizes(component: str, model: nn.Module, structures: Iterable[Structure], removed: Removed) -> Iterator[Resize]:
    """The edits that remove these units, without new values for what is kept: one a module."""
    gone: dict[str, _Gone] = {}
    for structure in structures:
        units = removed.get(structure.name, ())
        for part in structure.writers if units else ():
            gone.setdefault(part.module, _Gone()).outputs.update(part.places(units))
        for part in structure.readers if units else ():
            gone.setdefault(part.module, _Gone()).inputs.update(part.places(units))
        for part in (*structure.writers, *structure.readers, *structure.owners) if units else ():
            own = gone.setdefault(part.module, _Gone())
            for name in part.attributes:
                value = getattr(model.get_submodule(part.module), name)
                own.attributes[name] = own.attributes.get(name, value) - value // structure.count * len(units)
    for name, own in gone.items():
        yield own.edit(component, name, model.get_submodule(name))


class _Gone:
    """What is removed of one module."""

    def __init__(self) -> None:
        self.outputs: set[int] = set()
        self.inputs: set[int] = set()
        self.attributes: dict[str, int] = {}

    def edit(self, component: str, name: str, module: nn.Module) -> Resize:
        return Resize(
            component=component,
            module=name,
            outputs=_kept(module, 0, self.outputs),
            inputs=_kept(module, 1, self.inputs),
            attributes=self.attributes,
        )


def _kept(module: nn.Module, dimension: int, gone: set[int]) -> tuple[Run, ...] | None:
    if not gone:
        return None
    weight = module.weight
    assert isinstance(weight, Tensor)
    return runs_of(place for place in range(weight.shape[dimension]) if place not in gone)
