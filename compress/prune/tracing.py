"""Which units a model has, told by where gradients flow in one of its calls: no class of models is known by name.

One call is made with its graph cut behind every layer. A layer's input is then made of the outputs of a few others, and the
gradient of one of its columns says which of their rows, and which entries of norms between, have a part in it. Columns whose
rows nobody else has a part in are a unit: a head, a neuron, or the channels that a norm takes together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from diffpress.calibration.sampling import Call, answer
from diffpress.export.runtime import Forward, Wrap

from ..data_flow import first_argument
from ..options import Removable
from ..overlay import overlaid
from .structures import Part, Span, Structure

COUNTS = ("heads", "num_heads", "n_heads", "num_attention_heads", "kv_heads", "sliceable_head_dim")
"""What modules call the number of their heads."""
WIDTHS = ("inner_dim", "inner_kv_dim", "hidden_dim", "mlp_hidden_dim", "inner_hidden_dim", "channels")
"""What they call the width of all heads together, or of their neurons, or of what they read."""
SAMPLE = ""
"""Stands for the model's sample among the names of layers."""
CHECKED = 4
"""Units of a structure that gradients are looked at for."""


class Source(NamedTuple):
    """Where a gradient arrives: an output of a layer, or a parameter of a module between layers."""

    module: str
    leaf: Tensor
    dimension: int
    """Of `leaf`: its rows, or its channels."""
    parameter: bool


class NoUnitsError(Exception):
    """Why columns of a layer cannot be removed."""


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

    def begin(self, value: Tensor, name: str, dimension: int) -> Tensor:
        """`value` as the beginning of a piece of the graph."""
        leaf = value.detach().requires_grad_()
        self.leaves[id(leaf)] = Source(name, leaf, dimension, False)
        # A copy: models add in place, which leaves of a graph refuse.
        return leaf.clone()

    def cut(self, name: str) -> Wrap:
        """Around the forward of the layer `name`."""

        def around(beneath: Forward) -> Forward:
            def forward(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
                self.inputs.setdefault(name, []).append(x)
                if {source.module for source in self.sources(x)} & self.behind_sample:
                    self.behind_sample.add(name)
                return self.begin(beneath(x, *arguments, **options), name, _channels(self.model, name))

            return forward

        return around

    def sources(self, x: Tensor) -> list[Source]:
        """Everything that `x` is made of."""
        found: dict[int, Source] = {}
        waiting, seen = [x.grad_fn], set()
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
    argument = first_argument(model)
    inputs = {name: trace.begin(value, SAMPLE, 0) if name == argument else value for name, value in call.inputs.items()}
    with _all_learning(model), overlaid(model, {name: trace.cut(name) for name in layers}), torch.enable_grad():
        for name, module in between:
            for parameter in module.parameters(recurse=False):
                trace.leaves[id(parameter)] = Source(name, parameter, 0, True)
        trace.output = answer(model, inputs, call.output.dtype)
        yield trace


def find_structures(model: nn.Module, call: Call) -> tuple[list[Structure], dict[str, str]]:
    """All units of `model`, in the order in which they are read, and per layer that reads the sample why it has none."""
    found: list[Structure] = []
    reasons: dict[str, str] = {}
    with traced(model, call) as trace:
        for group in _groups(trace):
            try:
                found += _structures(trace, group)
            except NoUnitsError as why:
                reasons |= {name: str(why) for name in group.readers}
    return found, reasons


class _Group(NamedTuple):
    """Layers that read from the same others, which nobody else reads from."""

    readers: list[str]
    sources: list[Source]


def _groups(trace: Traced) -> list[_Group]:
    """By what they read: two layers that share an output are in one group, and so is everything that shares with them."""
    read = {name: trace.sources(xs[0]) for name, xs in trace.inputs.items() if name in trace.behind_sample}
    groups: list[tuple[list[str], dict[int, Source]]] = []
    for name, sources in read.items():
        readers, together = [name], {id(source.leaf): source for source in sources}
        layers = {key for key, source in together.items() if not source.parameter}
        for other in [own for own in groups if any(key in layers for key in own[1])]:
            groups.remove(other)
            readers, together = other[0] + readers, other[1] | together
        groups.append((readers, together))
    given = {id(source.leaf) for source in trace.sources(trace.output)}
    return [
        _Group(readers, list(sources.values()))
        for readers, sources in groups
        if not any(key in given for key, source in sources.items() if not source.parameter)
        and not any(source.module == SAMPLE and not source.parameter for source in sources.values())
    ]


@dataclass(frozen=True)
class _Columns:
    """Neighbouring columns of a layer that are units of one kind, and the rows of each unit."""

    reader: Part
    count: int
    rows: dict[int, tuple[Span, ...]]
    """By the identity of the source."""

    def shares_rows_with(self, other: _Columns) -> bool:
        """Whether any row is of a unit of both."""
        return any(self._all(leaf) & other._all(leaf) for leaf in self.rows.keys() & other.rows.keys())

    def _all(self, leaf: int) -> set[int]:
        return {place for span in self.rows[leaf] for place in range(span.start, span.start + span.width * self.count)}


def _structures(trace: Traced, group: _Group) -> Iterator[Structure]:
    """Readers that share rows, unit by unit, are of one structure."""
    _check_layers(trace, group)
    if any(trace.inputs[name][0].ndim < 3 for name in group.readers):
        raise NoUnitsError("one row an image")
    together: list[list[_Columns]] = []
    for name in group.readers:
        for columns in _columns(trace, name, group.sources):
            sharing = [own for own in together if any(columns.shares_rows_with(other) for other in own)]
            together = [own for own in together if own not in sharing]
            together.append([*(each for own in sharing for each in own), columns])
    by_leaf = {id(source.leaf): source for source in group.sources}
    for index, own in enumerate(together):
        yield _structure(trace.model, own, by_leaf, "" if len(together) == 1 else f"[{index}]")


def _check_layers(trace: Traced, group: _Group) -> None:
    for name in {*group.readers, *(source.module for source in group.sources if not source.parameter)}:
        if len(trace.inputs.get(name, ())) != 1:
            raise NoUnitsError("called more than once")
        if not isinstance(trace.model.get_submodule(name), (nn.Linear, nn.Conv2d)):
            raise NoUnitsError(f"{type(trace.model.get_submodule(name)).__name__} is not resized")


def _structure(model: nn.Module, own: Sequence[_Columns], by_leaf: Mapping[int, Source], suffix: str) -> Structure:
    rows = {leaf: spans for columns in own for leaf, spans in columns.rows.items()}
    if any(
        columns.count != own[0].count or rows[leaf] != columns.rows[leaf] for columns in own for leaf in columns.rows
    ):
        raise NoUnitsError("layers read it in different ways")
    writers = {}
    for leaf, spans in rows.items():
        # A norm's weight and bias have the same places.
        name = by_leaf[leaf].module
        writers[name] = Part(name, spans, _own_numbers(model.get_submodule(name)))
    readers = tuple(columns.reader for columns in own)
    parts = (*writers.values(), *readers)
    name = (_common([part.module for part in parts]) or readers[0].module) + suffix
    count = own[0].count
    owners = _owners(model, parts, count)
    return Structure(name, _kind(model, readers[0], owners), count, tuple(writers.values()), readers, owners)


def _kind(model: nn.Module, reader: Part, owners: Sequence[Part]) -> Removable:
    if any(name in COUNTS for part in owners for name in part.attributes):
        return "heads"
    return "channels" if isinstance(model.get_submodule(reader.module), nn.Conv2d) else "neurons"


def _own_numbers(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.GroupNorm):
        return ("num_groups",)
    return ("groups", "in_channels") if isinstance(module, nn.Conv2d) and module.groups > 1 else ()


def _owners(model: nn.Module, layers: Sequence[Part], count: int) -> tuple[Part, ...]:
    """Modules around the layers, with the numbers of them that follow from how many units there are."""
    totals = {span.width * count for part in layers for span in part.spans}
    owners = []
    for name in dict.fromkeys(part.module.rpartition(".")[0] for part in layers):
        numbers = {key: value for key, value in vars(model.get_submodule(name)).items() if type(value) is int}
        counts = [key for key in COUNTS if key in numbers and numbers[key] and numbers[key] % count == 0]
        widths = [key for key in WIDTHS if numbers.get(key) in totals]
        if counts or widths:
            owners.append(Part(name, attributes=(*counts, *widths)))
    return tuple(owners)


def _columns(trace: Traced, name: str, sources: Sequence[Source]) -> Iterator[_Columns]:
    """The columns of one layer, in pieces of one kind of units."""
    probe = _Probe(trace.inputs[name][0], _channels(trace.model, name), sources)
    first, width = 0, trace.inputs[name][0].shape[probe.dimension]
    while first < width:
        last = probe.last_alike(first, width - 1)
        yield _units(name, probe, first, last)
        first = last + 1


def _units(name: str, probe: _Probe, first: int, last: int) -> _Columns:
    """As many units as the rows between those of the first and of the last column allow."""
    low, high = probe.rows(range(first, first + 1)), probe.rows(range(last, last + 1))
    if [(leaf, len(runs)) for leaf, runs in low.items()] != [(leaf, len(runs)) for leaf, runs in high.items()]:
        raise NoUnitsError("its columns are made of different things")
    # What all units share, as the norm of every head, belongs to none.
    moving = [leaf for leaf in low if not (probe.sources[leaf].parameter and low[leaf] == high[leaf])]
    pairs = {leaf: list(zip(low[leaf], high[leaf], strict=True)) for leaf in moving}
    totals = {leaf: [b.start + b.width - a.start for a, b in own] for leaf, own in pairs.items()}
    counts = [total / a.width for leaf in moving for total, (a, _) in zip(totals[leaf], pairs[leaf], strict=True)]
    count = int(min(counts, default=1))
    if count < 2 or any(total % count for total in (last + 1 - first, *(t for own in totals.values() for t in own))):
        raise NoUnitsError("no two of its columns are apart")
    rows = {
        leaf: tuple(Span(a.start, total // count) for total, (a, _) in zip(totals[leaf], pairs[leaf], strict=True))
        for leaf in moving
    }
    columns = _Columns(Part(name, (Span(first, (last + 1 - first) // count),)), count, rows)
    _check_units(probe, columns)
    return columns


def _check_units(probe: _Probe, columns: _Columns) -> None:
    """What units are made of is theirs alone."""
    count, (span,) = columns.count, columns.reader.spans
    for unit in sorted({0, count - 1, *(count * part // CHECKED for part in range(1, CHECKED))}):
        for leaf, runs in probe.rows(span.of(unit)).items():
            own = {place for part in columns.rows.get(leaf, ()) for place in part.of(unit)}
            if leaf in columns.rows and not {place for run in runs for place in run.of(0)} <= own:
                raise NoUnitsError("no two of its columns are apart")


class _Probe:
    """Gradients of columns of one layer's input."""

    def __init__(self, x: Tensor, dimension: int, sources: Sequence[Source]) -> None:
        self.x, self.dimension = x, dimension % x.ndim
        self.sources = {id(source.leaf): source for source in sources}
        self.generator = torch.Generator().manual_seed(0)

    def rows(self, columns: range) -> dict[int, tuple[Span, ...]]:
        """Runs of places that have a part in these columns, by the sources they are of."""
        seed = torch.zeros_like(self.x)
        place = seed.narrow(self.dimension, columns.start, len(columns))
        place.copy_(torch.randn(place.shape, generator=self.generator))
        leaves = [source.leaf for source in self.sources.values()]
        gradients = torch.autograd.grad(self.x, leaves, seed, retain_graph=True, allow_unused=True)
        found = {}
        for (leaf, source), gradient in zip(self.sources.items(), gradients, strict=True):
            runs = () if gradient is None else _runs(gradient, source.dimension)
            if runs:
                found[leaf] = runs
        return found

    def last_alike(self, first: int, last: int) -> int:
        """The last column up to which all are made as the `first` one is."""
        wanted = self._signature(first)
        if self._signature(last) == wanted:
            return last
        low, high = first, last
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._signature(middle) == wanted else (low, middle)
        return low

    def _signature(self, column: int) -> dict[int, tuple[int, ...]]:
        found = self.rows(range(column, column + 1))
        return {leaf: tuple(run.width for run in runs) for leaf, runs in found.items()}


def _runs(gradient: Tensor, dimension: int) -> tuple[Span, ...]:
    """Neighbouring places along `dimension` at which there is any gradient."""
    reached = gradient.movedim(dimension, 0).reshape(gradient.shape[dimension], -1).ne(0).any(1)
    places = reached.nonzero()[:, 0].tolist()
    runs: list[Span] = []
    for place in places:
        if runs and place == runs[-1].start + runs[-1].width:
            runs[-1] = Span(runs[-1].start, runs[-1].width + 1)
        else:
            runs.append(Span(place, 1))
    return tuple(runs)


def _is_layer(module: nn.Module) -> bool:
    """What is between a layer and the next is what works on every channel by itself; a depthwise convolution does."""
    return isinstance(module, (nn.Linear, _ConvNd)) and not _is_depthwise(module)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels > 1


def _channels(model: nn.Module, name: str) -> int:
    """The dimension of channels of what a layer reads and writes."""
    return 1 if isinstance(model.get_submodule(name), _ConvNd) else -1


def _common(names: Sequence[str]) -> str:
    """The innermost module that all are in."""
    paths = [name.split(".")[:-1] for name in names]
    shared = 0
    while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return ".".join(paths[0][:shared])


@contextmanager
def _all_learning(model: nn.Module) -> Iterator[None]:
    """Every parameter has a gradient while the context lasts."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
