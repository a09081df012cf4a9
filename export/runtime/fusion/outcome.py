"""What became of every packed layer of a denoiser that is compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import nn

from ..packed import PackedEmbedding, PackedLayer

NOT_YET = "not compiled yet: graphs are made by the first call"
OUTSIDE = "outside the blocks that are compiled"
EXPANDED = "it is expanded, and computes in floats here"
EMBEDDING = "an embedding has no input to quantise"


class Fusion(NamedTuple):
    """A packed layer, and the norm that makes its codes, or the reason why none does."""

    layer: str
    norm: str | None
    reason: str | None


class Fusions:
    """The outcome for every packed layer, in the order of the model; it is known once a graph is made, by the first call.

    Of `regions`, modules by name that are compiled one by one, equal ones run the graph of one, and have its outcome.
    """

    def __init__(self, denoiser: nn.Module, regions: Mapping[str, nn.Module]) -> None:
        self._denoiser, self._regions = denoiser, regions
        self._found: dict[str, Fusion] = {}

    def add(self, found: Iterable[Fusion]) -> None:
        """What one more graph gave; a layer that is called twice in it is fused where both calls are."""
        latest: dict[str, Fusion] = {}
        for fusion in found:
            known = latest.get(fusion.layer)
            latest[fusion.layer] = fusion if known is None or known.reason is None else known
        self._found |= latest

    def __iter__(self) -> Iterator[Fusion]:
        for name, layer in self._denoiser.named_modules():
            if isinstance(layer, PackedLayer):
                known = self._found.get(name) or next(self._of_twins(name, layer), None)
                yield Fusion(name, None, self._missing(name, layer)) if known is None else known._replace(layer=name)

    def _missing(self, name: str, layer: PackedLayer) -> str:
        """Why nothing is known of a layer."""
        if isinstance(layer, PackedEmbedding):
            return EMBEDDING
        if layer.floats is not None:
            return EXPANDED
        return NOT_YET if self._home(name) is not None else OUTSIDE

    def _home(self, name: str) -> str | None:
        """The region that holds a layer."""
        return next((region for region in self._regions if not region or name.startswith(f"{region}.")), None)

    def _of_twins(self, name: str, layer: PackedLayer) -> Iterator[Fusion]:
        """What is known of layers of the same form, at the same place in other regions of the same class."""
        home = self._home(name)
        for region, module in self._regions.items() if home else ():
            twin = region + name.removeprefix(home or "")
            if type(module) is type(self._regions[home or ""]) and twin in self._found:
                other = self._denoiser.get_submodule(twin)
                assert isinstance(other, PackedLayer)
                if (other.edit.words(), other.weight.shape) == (layer.edit.words(), layer.weight.shape):
                    yield self._found[twin]

    def counts(self) -> dict[str, int]:
        """How many layers there are of each norm and each reason, the most first."""
        return dict(Counter(fusion.norm or fusion.reason or "" for fusion in self).most_common())

    def __str__(self) -> str:
        return "\n".join(f"{fusion.layer}: {fusion.norm or f'not fused, {fusion.reason}'}" for fusion in self)
