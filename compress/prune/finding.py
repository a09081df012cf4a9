"""Which units a model has, told by where gradients flow in one of its calls: no class of models is known by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from diffpress.calibration.sampling import Call

from ..options import Removable
from .probing import Columns, NoUnitsError, columns_of
from .structures import Part, Span, Structure
from .tracing import SAMPLE, Source, Traced, traced

COUNTS = ("heads", "num_heads", "n_heads", "num_attention_heads", "kv_heads", "sliceable_head_dim")
"""What modules call the number of their heads."""
WIDTHS = ("inner_dim", "inner_kv_dim", "hidden_dim", "mlp_hidden_dim", "inner_hidden_dim", "channels")
"""What they call the width of all heads together, or of their neurons, or of what they read."""


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
    return _named_apart(found), reasons


def _named_apart(structures: Sequence[Structure]) -> list[Structure]:
    """With a number behind the names that several have."""
    names = Counter(own.name for own in structures)
    seen = Counter[str]()
    apart = []
    for own in structures:
        apart.append(replace(own, name=f"{own.name}[{seen[own.name]}]") if names[own.name] > 1 else own)
        seen[own.name] += 1
    return apart


class _Group(NamedTuple):
    """Layers that read from the same others, which nobody else reads from."""

    readers: list[str]
    sources: list[Source]


def _groups(trace: Traced) -> list[_Group]:
    """By what they read: two layers that share an output are in one group, and so is everything that shares with them."""
    read = {name: trace.sources(xs) for name, xs in trace.inputs.items() if name in trace.behind_sample}
    groups: list[tuple[list[str], dict[int, Source]]] = []
    for name, sources in read.items():
        readers, together = [name], {id(source.leaf): source for source in sources}
        layers = {key for key, source in together.items() if not source.parameter}
        for other in [own for own in groups if any(key in layers for key in own[1])]:
            groups.remove(other)
            readers, together = other[0] + readers, other[1] | together
        groups.append((readers, together))
    given = {id(source.leaf) for source in trace.sources([trace.output])}
    return [
        _Group(readers, list(sources.values()))
        for readers, sources in groups
        if not any(key in given for key, source in sources.items() if not source.parameter)
        and not any(source.module == SAMPLE and not source.parameter for source in sources.values())
    ]


def _structures(trace: Traced, group: _Group) -> Iterator[Structure]:
    """Readers that share rows, unit by unit, are of one structure."""
    _check_layers(trace, group)
    if any(trace.inputs[name][0].ndim < 3 for name in group.readers):
        raise NoUnitsError("one row an image")
    together: list[list[Columns]] = []
    for name in group.readers:
        for columns in columns_of(trace, name, group.sources):
            sharing = [own for own in together if any(columns.shares_rows_with(other) for other in own)]
            together = [own for own in together if own not in sharing]
            together.append([*(each for own in sharing for each in own), columns])
    by_leaf = {id(source.leaf): source for source in group.sources}
    for own in together:
        yield _structure(trace.model, own, by_leaf, _unseen(own, together, by_leaf))


def _unseen(
    own: Sequence[Columns], together: Sequence[Sequence[Columns]], by_leaf: Mapping[int, Source]
) -> list[Source]:
    """Layers no answer of which is seen, that are computed like those of these columns: their units go with them.

    Queries of text are such in a last block that answers nothing to text. They are told by how many rows they have.
    """

    def sizes(columns: Iterable[Columns]) -> set[int]:
        leaves = [leaf for each in columns for leaf in each.rows if not by_leaf[leaf].parameter]
        return {by_leaf[leaf].channels for leaf in leaves}

    seen = {leaf for columns in together for each in columns for leaf in each.rows}
    others = {size for columns in together if columns is not own for size in sizes(columns)}
    alike = sizes(own) if len(sizes(own)) == 1 and len({*_rows(own, by_leaf).values()}) == 1 else set()
    return [
        source
        for leaf, source in by_leaf.items()
        if leaf not in seen and not source.parameter and source.channels in alike - others
    ]


def _rows(own: Sequence[Columns], by_leaf: Mapping[int, Source]) -> dict[str, tuple[Span, ...]]:
    """Of the layers that write."""
    return {
        by_leaf[leaf].module: spans
        for columns in own
        for leaf, spans in columns.rows.items()
        if not by_leaf[leaf].parameter
    }


def _check_layers(trace: Traced, group: _Group) -> None:
    for name in {*group.readers, *(source.module for source in group.sources if not source.parameter)}:
        layer = trace.model.get_submodule(name)
        if len(trace.inputs.get(name, ())) != 1:
            raise NoUnitsError("called more than once")
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            raise NoUnitsError(f"{type(layer).__name__} is not resized")
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            raise NoUnitsError(f"a convolution in {layer.groups} groups is not resized")
        if others := _sharing(trace.model, name, layer):
            raise NoUnitsError(f"its weights are those of {others[0]}")


def _sharing(model: nn.Module, name: str, layer: nn.Module) -> list[str]:
    """Parameters under other names that are a layer's own."""
    own = {id(parameter) for parameter in layer.parameters()}
    everywhere = model.named_parameters(remove_duplicate=False)
    return [other for other, parameter in everywhere if id(parameter) in own and other.rpartition(".")[0] != name]


def _structure(
    model: nn.Module, own: Sequence[Columns], by_leaf: Mapping[int, Source], unseen: Sequence[Source]
) -> Structure:
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
    for source in unseen:
        writers[source.module] = Part(source.module, next(iter(_rows(own, by_leaf).values())))
    readers = tuple(columns.reader for columns in own)
    parts = (*writers.values(), *readers)
    name = _common([part.module for part in parts]) or readers[0].module
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


def _common(names: Sequence[str]) -> str:
    """The innermost module that all are in."""
    paths = [name.split(".")[:-1] for name in names]
    shared = 0
    while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return ".".join(paths[0][:shared])
