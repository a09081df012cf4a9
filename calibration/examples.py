"""Single images' calls out of recorded runs, put together into batches of any order and any mix of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .sampling import Call, timestep_input
from .trajectory import Form, Trajectories


class Batch(NamedTuple):
    """Calls of B images as one call: guidance's parts after each other, as the pipeline itself lays them out."""

    inputs: dict[str, Tensor]
    output: Tensor
    """[parts * B, ...]"""
    steps: Tensor
    """[B]"""
    branches: Tensor
    """[B] which of the calls of its step each is."""


@dataclass(frozen=True)
class _Place:
    """Where one image's share of one call lies."""

    shard: Path
    call: int
    step: int
    image: int
    images: int
    form: Form
    """Of the image's share; only shares of one form make a batch."""


class Examples:
    """Everything recorded in some shards, one image of one call at a time; read through the memory map when asked for."""

    def __init__(self, trajectories: Trajectories, shards: Sequence[Path]) -> None:
        self._trajectories = trajectories
        self._places = [
            _Place(shard, call, step, image, images, _share_form(form, images))
            for shard in shards
            for images in [trajectories.images(shard)]
            for call, (step, form) in enumerate(zip(trajectories.steps(shard), trajectories.forms(shard), strict=True))
            for image in range(images)
        ]
        self.steps = torch.tensor([place.step for place in self._places])
        """[N] of each example."""
        self.runs: list[list[list[int]]] = _runs_by_form(self._places)
        """For every form, the examples of each image, in the order of its calls."""

    def __len__(self) -> int:
        return len(self._places)

    def batch(self, indices: Sequence[int]) -> Batch:
        """These examples, all of one form, as one call; the time step gets one entry an image and part.

        Inputs without a batch axis, such as positions, are those of the first example.
        """
        calls = [self._share(self._places[index]) for index in indices]
        parts = len(calls[0].output)
        inputs = {
            name: _joined([call.inputs[name] for call in calls]) if first.shape[:1] == (parts,) else first
            for name, first in calls[0].inputs.items()
        }
        output = _joined([call.output for call in calls])
        steps, branches = zip(*((call.step, call.branch) for call in calls), strict=True)
        return Batch(inputs, output, torch.tensor(steps), torch.tensor(branches))

    def _share(self, place: _Place) -> Call:
        """One image's rows of one call."""
        call = self._trajectories.call(place.shard, place.call)
        rows = call.output.shape[0]
        own = slice(place.image, rows, place.images)
        inputs = {
            name: value[own] if value.ndim and value.shape[0] == rows else value for name, value in call.inputs.items()
        }
        time = timestep_input(inputs)
        assert time is not None
        inputs[time] = call.inputs[time].flatten()[:1].expand(rows // place.images)
        return Call(inputs, call.output[own], call.step, branch=call.branch)


def _share_form(form: Form, images: int) -> Form:
    """What is left of a call's form when it is shared between its images; the time step is cut to one a part."""
    rows = next(shape[0] for name, _, shape in form if name == "output")
    time = timestep_input([name.removeprefix("inputs.") for name, *_ in form])
    return tuple(
        (name, dtype, (rows // images, *shape[1:]) if shape[:1] == (rows,) else shape)
        for name, dtype, shape in form
        if name not in ("guided", f"inputs.{time}")
    )


def _runs_by_form(places: Sequence[_Place]) -> list[list[list[int]]]:
    runs: dict[Form, dict[tuple[Path, int], list[int]]] = {}
    for index, place in enumerate(places):
        runs.setdefault(place.form, {}).setdefault((place.shard, place.image), []).append(index)
    return [list(own.values()) for own in runs.values()]


def _joined(shares: Sequence[Tensor]) -> Tensor:
    """Shares [parts, ...] of B images as [parts * B, ...], the images of one part beside each other."""
    return torch.stack(list(shares), dim=1).flatten(0, 1)
