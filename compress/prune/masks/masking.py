"""Gates laid around the layers that read units, which make up for what is shut as they will once it is gone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffpress.export.runtime import Forward, Wrap

from ..moments import Moments
from ..structures import Part, Structure
from ..surgeon import damped

REPEATED = 2
"""Times that what is shut is told from the rest: the second time from what was told of others that are shut."""


@dataclass(frozen=True)
class Predictor:
    """What a unit of a layer's input was, by least squares from all others: x_u = -[(H^-1)_uu]^-1 (H^-1)_u,others x_others."""

    weight: Tensor
    """[in, in]; nothing from a unit to itself."""
    bias: Tensor
    """[in]"""

    def __call__(self, x: Tensor, gates: Tensor) -> Tensor:
        """The input [..., in] with all units but those that are shut, and with what the others tell of these."""
        left = x * gates
        told = left
        for _ in range(REPEATED):
            told = left + (1 - gates) * (told @ self.weight.t() + self.bias)
        return told


def predictor(layer: nn.Module, moments: Moments, parts: Sequence[tuple[Part, int]]) -> Predictor:
    """Of the parts of a layer's input, each with as many units, from what it is fed; of a convolution's middle tap."""
    xx = _of_channels(layer, moments.xx)
    inputs = xx.shape[0] - 1
    inverse = torch.linalg.inv(damped(xx))
    weight = torch.zeros_like(xx)
    for part, count in parts:
        for unit in range(count):
            own = part.places([unit])
            weight[own] = -torch.linalg.solve(inverse[own][:, own], inverse[own])
            for place in own:
                weight[place, own] = 0
    tensor = layer.weight
    assert isinstance(tensor, Tensor)
    return Predictor(weight[:inputs, :inputs].to(tensor.dtype), weight[:inputs, inputs].to(tensor.dtype))


def _of_channels(layer: nn.Module, xx: Tensor) -> Tensor:
    """[in + 1, in + 1] of moments of all columns, the last of which is a 1 where the layer has a bias."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    taps = weight[0, 0].numel()
    places = torch.arange(weight.shape[1], device=xx.device) * taps + taps // 2
    if layer.bias is None:
        small = torch.zeros(len(places) + 1, len(places) + 1, dtype=xx.dtype, device=xx.device)
        small[:-1, :-1] = xx[places][:, places]
        small[-1, -1] = 1
        return small
    places = torch.cat([places, torch.tensor([len(xx) - 1], device=xx.device)])
    return xx[places][:, places]


@dataclass
class Masks:
    """All layers that read units. While `gates` are set, and its wraps are laid, what is shut is not read."""

    model: nn.Module
    structures: Sequence[Structure]
    predictors: Mapping[str, Predictor]
    gates: Mapping[str, Tensor]
    """[units] of each structure, in 0..1."""

    def wraps(self) -> dict[str, Wrap]:
        """Around the forwards of the layers."""
        return {name: self._wrap(name) for name in self.predictors}

    def _wrap(self, name: str) -> Wrap:
        layer = self.model.get_submodule(name)

        def around(beneath: Forward) -> Forward:
            def forward(x: Tensor) -> Tensor:
                gates = self._inputs(name).to(x)
                if isinstance(layer, nn.Conv2d):
                    return beneath(self.predictors[name](x.movedim(1, -1), gates).movedim(-1, 1))
                return beneath(self.predictors[name](x, gates))

            return forward

        return around

    def _inputs(self, name: str) -> Tensor:
        """[in] the gate of every input of a layer; 1 where it is of no unit."""
        weight = self.model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        gates = torch.ones(weight.shape[1], device=weight.device)
        for structure, part in self._read_by(name):
            places = torch.tensor([part.places([unit]) for unit in range(structure.count)], device=weight.device)
            own = self.gates[structure.name][:, None].expand(places.shape)
            gates = gates.index_put((places,), own.to(gates))
        return gates

    def _read_by(self, name: str) -> Iterator[tuple[Structure, Part]]:
        for structure in self.structures:
            for part in structure.readers:
                if part.module == name:
                    yield structure, part
