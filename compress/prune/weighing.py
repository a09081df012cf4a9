"""What units weigh, in parameters or in multiplications."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffpress.calibration.cost import operation_formulas, parameter_count
from diffpress.calibration.sampling import Call, replay

from ..options import Removal
from .budget import step_of
from .structures import Part, Structure


class Weights(NamedTuple):
    """In what a budget is counted in."""

    units: Mapping[str, float]
    """Of one unit of each structure."""
    total: float
    """Of everything that a share is taken of."""

    def most(self, structures: Sequence[Structure], multiple: int) -> float:
        """The share that can be removed: one unit of each structure stays, or as many as are kept together."""
        return sum((own.count - step_of(own.count, multiple)) * self.units[own.name] for own in structures) / self.total


def weigh(model: nn.Module, structures: Sequence[Structure], call: Call, options: Removal) -> Weights:
    """Of one unit of each, and of the whole."""
    if options.share_of == "macs":
        return _macs(model, structures, call)
    units = {own.name: float(own.parameters(model)) for own in structures}
    of_units = sum(own.count * units[own.name] for own in structures)
    return Weights(units, of_units if options.share_of == "units" else parameter_count(model))


@torch.no_grad()
def _macs(model: nn.Module, structures: Sequence[Structure], call: Call) -> Weights:
    with FlopCounterMode(display=False, custom_mapping=operation_formulas()) as counter:
        replay(model, call)
    counts = counter.get_flop_counts()

    def macs(module: str) -> float:
        return sum(counts.get(f"{type(model).__name__}.{module}", {}).values()) / 2

    def share(part: Part, size: int) -> float:
        return macs(part.module) * len(part.places([0])) / size

    units = {}
    for own in structures:
        layers = sum(share(part, _size(model, part, 0)) for part in own.writers)
        layers += sum(share(part, _size(model, part, 1)) for part in own.readers)
        between = sum(_between(model, part.module, macs) for part in own.owners) if own.kind == "heads" else 0.0
        units[own.name] = layers + between / own.count
    return Weights(units, counter.get_total_flops() / 2)


def _size(model: nn.Module, part: Part, dimension: int) -> int:
    weight = model.get_submodule(part.module).weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[dimension]


def _between(model: nn.Module, module: str, macs: Callable[[str], float]) -> float:
    """What a module multiplies beside its layers: products of queries, keys and values."""
    layers = [
        name for name, own in model.get_submodule(module).named_modules() if isinstance(own, (nn.Linear, nn.Conv2d))
    ]
    return max(0.0, macs(module) - sum(macs(f"{module}.{name}") for name in layers))
