"""A denoiser with a step plan as modules that graphs are made of: nothing is kept inside, features go in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..portable.manifest import CORRECTION, FORECAST
from ..runtime import INT8_MAX, Frame, Inheritance, hold
from .features import Feature
from .part import Input, Part, Size


class PlannedDenoiser(nn.Module):
    """What `module` answers where units that compute do and the others forecast, and behind it the features `given`.

    `taken` are inputs behind those of `module`: see `planned_part`.
    """

    def __init__(
        self,
        module: nn.Module,
        inheritance: Inheritance,
        computes: tuple[bool, ...],
        given: Sequence[Feature],
        features: Sequence[Feature],
        taken: Sequence[str],
    ) -> None:
        super().__init__()
        self.module, self.computes, self.given, self.features, self.taken = module, computes, given, features, taken
        self.sizes: dict[str, Size] = {}
        # It is a module of the denoiser already.
        self._inheritance = [inheritance]

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        count = len(arguments) - len(self.taken)
        taken = dict(zip(self.taken, arguments[count:], strict=True))
        (inheritance,) = self._inheritance
        with inheritance.standing_in(self._frame(inheritance, taken, arguments[0].shape[0])) as frame:
            output = self.module(*arguments[:count])
        if not torch.compiler.is_exporting():
            self.sizes = {name: size for own in self.given for name, size in _sizes(frame, own).items()}
        return output, *(held for own in self.given for held in _held(own, frame.made[own.unit][own.place]))

    def _frame(self, inheritance: Inheritance, taken: Mapping[str, Tensor], batch: int) -> Frame:
        """What nobody asks for is forecast from nothing."""
        count, kept = len(self.computes), inheritance.plan.kept
        weights = taken.get(FORECAST, torch.ones(count, kept))
        forecast = sorted({own.unit for own in self.features if not self.computes[own.unit]})
        frame = Frame(
            self.computes,
            {unit: weights[unit].unbind() for unit in forecast},
            {unit: self._past(taken, unit, batch, kept) for unit in forecast},
            skips=(False,) * len(inheritance.skippable),
        )
        if CORRECTION in taken:
            row = inheritance.corrections()[taken[CORRECTION]].float()
            frame.corrections = row.split(inheritance.channels, 1)
        return frame

    def _past(self, taken: Mapping[str, Tensor], unit: int, batch: int, kept: int) -> list[tuple[Tensor, ...]]:
        own = [feature for feature in self.features if feature.unit == unit]
        return [tuple(_past_of(feature, taken, count, batch) for feature in own) for count in range(1, kept + 1)]


def planned_part(
    part: Part,
    inheritance: Inheritance,
    computes: tuple[bool, ...],
    features: Sequence[Feature],
    given: Sequence[Feature],
    taken: Sequence[str],
    name: str,
) -> Part:
    """The graph `name` of a denoiser's `part`: `given` are features that it gives, `taken` names of what it is given more."""
    module = PlannedDenoiser(part.module, inheritance, computes, given, features, taken).eval()
    known = _inputs(inheritance, features)
    return Part(
        name,
        module,
        (*part.inputs, *(known[own] for own in taken)),
        part.output,
        tuple(held for own in given for held in names_of(own)),
        lambda: module.sizes,
    )


def names_of(feature: Feature) -> tuple[str, ...]:
    """The outputs that hold a feature."""
    return (feature.name, feature.scale) if feature.storage == "int8" else (feature.name,)


def _inputs(inheritance: Inheritance, features: Sequence[Feature]) -> dict[str, Input]:
    """All that graphs may be given, by name."""
    plan = inheritance.plan
    known = [
        Input(FORECAST, (len(plan.units), plan.kept), batched=False),
        Input(CORRECTION, (), below=len(plan.inheriting) + 1, batched=False),
    ]
    for own in features:
        for count in range(1, own.kept + 1):
            known.append(Input(own.past(count), own.shape, dtype="int8" if own.storage == "int8" else "float32"))
            # With codes of up to 127 features are about as large as other random inputs.
            known.append(Input(f"{own.scale}.past{count}", (), batched=False, spread=1 / INT8_MAX))
    return {item.name: item for item in known}


def _past_of(feature: Feature, taken: Mapping[str, Tensor], count: int, batch: int) -> Tensor:
    """What nobody asks for is of the right shape."""
    value = taken.get(feature.past(count))
    if value is None:
        return torch.zeros(batch, *feature.shape)
    return value if feature.storage != "int8" else value * taken[f"{feature.scale}.past{count}"]


def _held(feature: Feature, value: Tensor) -> tuple[Tensor, ...]:
    held = hold(value, feature.storage)
    # Engines take and give no bfloat16 in numpy, but floats of its precision.
    return (held.tensor(),) if held.scale is None else (held.values, held.scale)


def _sizes(frame: Frame, feature: Feature) -> dict[str, Size]:
    """A small difference of large sums is as uncertain as they are; rounded, it may be the number beside the right one."""
    value, identity = frame.made[feature.unit][feature.place], frame.entries[feature.unit][feature.place]
    of_sum = _root_mean_square(value if identity is None else value + identity)
    if feature.storage == "int8":
        codes = _root_mean_square(hold(value, "int8").values)
        return {feature.name: Size(codes, 1 / codes), feature.scale: Size(of_sum)}
    rounding = 2.0**-8 if feature.storage == "bfloat16" else 0.0
    return {feature.name: Size(of_sum, rounding * _root_mean_square(value) / of_sum)}


def _root_mean_square(value: Tensor) -> float:
    # A rounding below nothing keeps what is divided by a size of zero finite.
    return max(float(value.double().square().mean().sqrt()), torch.finfo(torch.float32).tiny)
