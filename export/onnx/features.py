"""What the units of a step plan compute and later steps take up, as tensors that go in and out of graphs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import UnsupportedModelError
from ..runtime import Inheritance
from ..runtime.step_plan import Storage
from .part import Part

BATCH = 3
"""No other axis of a feature is likely to be as long."""


class Feature(NamedTuple):
    """A tensor that a unit computes: an output of graphs that compute it, and past ones inputs of graphs that forecast it."""

    name: str
    unit: int
    place: int
    """Among the tensors that the unit gives."""
    added: bool
    """Whether it is what the unit adds to one of its inputs, else all that it gives."""
    shape: tuple[int, ...]
    """Without the batch."""
    kept: int
    """How many past ones a forecast takes."""
    storage: Storage
    tables: tuple[NDArray[np.float16], NDArray[np.float16]] | None
    """[rows, channels, ...] by which a forecast is multiplied, and what is added then; the last row changes nothing."""

    def past(self, count: int) -> str:
        """The name of the latest, of the one before it, and so on, counted from 1."""
        return f"{self.name}.past{count}"

    @property
    def scale(self) -> str:
        """The name of what integers are multiplied by."""
        return f"{self.name}.scale"


def features_of(part: Part, inheritance: Inheritance) -> list[Feature]:
    """Of all units, by a call of the denoiser. Raises UnsupportedModelError where one does not begin with the batch."""
    with torch.no_grad(), inheritance.standing_in(inheritance.all_computed()) as frame:
        part.answer(part.example(BATCH, torch.Generator().manual_seed(0)))
    found = []
    # Units of which no step looks at a forecast leave none.
    for index, made in sorted(frame.made.items()):
        unit = inheritance.plan.units[index]
        for place, (tensor, argument) in enumerate(zip(made, unit.adds_to, strict=True)):
            if len(tensor) != BATCH:
                raise UnsupportedModelError(
                    f"{part.name} cannot be exported: what {unit.modules[-1]} gives is {tuple(tensor.shape)} for {BATCH} "
                    "images, and graphs keep what begins with the batch. Compress without `steps` to export."
                )
            shape = tuple(tensor.shape[1:])
            plan = inheritance.plan
            found.append(
                Feature(
                    *(f"feature.{index}.{place}", index, place, argument is not None, shape, plan.kept, plan.storage),
                    tables=_tables(inheritance, index, place, shape),
                )
            )
    return found


def _tables(
    inheritance: Inheritance, unit: int, place: int, shape: tuple[int, ...]
) -> tuple[NDArray[np.float16], NDArray[np.float16]] | None:
    if inheritance.correction is None:
        return None
    channels = inheritance.plan.units[unit].channels
    start = sum(inheritance.channels[:unit]) + sum(channels[:place])
    rows = inheritance.corrections()[:, :, start : start + channels[place]].numpy(force=True)
    # Maps have their channels first, others last: numpy fills up from the left.
    rows = rows.reshape(*rows.shape, *[1] * (len(shape) - 1 if len(shape) >= 3 else 0))
    return rows[:, 0], rows[:, 1]
