"""Single images' calls out of recorded runs, put together into batches of any order and any mix of steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffpress.export.runtime import time_of

from .inputs import Inputs
from .sampling import timestep_input
from .trajectory import Form, Trajectories


class Batch(NamedTuple):
    """Calls of B images as one call: guidance's parts after each other, as the pipeline itself lays them out."""

    inputs: Mapping[str, Tensor]
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


class _Share(NamedTuple):
    """One image's rows of one call."""

    arguments: dict[str, Any]
    output: Tensor
    listed: frozenset[str]
    """The arguments that are lists with an entry for each row."""
    branch: int


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
        shares = [self._share(self._places[index]) for index in indices]
        parts = len(shares[0].output)
        inputs = {
            name: _chosen_in_turn(values) if name in shares[0].listed else _together(values, parts)
            for name in shares[0].arguments
            for values in [[share.arguments[name] for share in shares]]
        }
        output = _joined([share.output for share in shares])
        return Batch(Inputs.of(inputs), output, self.steps[list(indices)], torch.tensor([own.branch for own in shares]))

    def _share(self, place: _Place) -> _Share:
        call = self._trajectories.call(place.shard, place.call)
        rows = call.output.shape[0]
        own = slice(place.image, rows, place.images)
        inputs = Inputs.like(call.inputs)
        listed = _listed(inputs.around, rows)
        arguments = {
            name: value[own] if name in listed else _rows_of(value, own, rows)
            for name, value in inputs.given(lambda _, value: value).items()
        }
        time = timestep_input(arguments)
        assert time is not None
        if time in inputs and inputs[time].ndim < 2:
            arguments[time] = time_of(inputs[time]).expand(rows // place.images)
        return _Share(arguments, call.output[own], listed, call.branch)


def _share_form(form: Form, images: int) -> Form:
    """What is left of a call's form when it is shared between its images; the time step is cut to one a part.

    Lists with an entry for each row make one list, whatever is in them.
    """
    rows = next(shape[0] for name, _, shape in form.tensors if name == "output")
    around = json.loads(form.around)
    time = timestep_input(around)
    free = {*_listed(around, rows), time}
    tensors = [
        (name, dtype, (rows // images, *shape[1:]) if shape[:1] == (rows,) else shape)
        for name, dtype, shape in form.tensors
        if name != "guided" and name.removeprefix("inputs.").split("/")[0] not in free
    ]
    return Form(tuple(tensors), json.dumps({name: node for name, node in around.items() if name not in free}))


def _listed(around: Mapping[str, Any], rows: int) -> frozenset[str]:
    return frozenset(name for name, node in around.items() if isinstance(node, list) and len(node) == rows)


def _rows_of(value: Any, own: slice, rows: int) -> Any:
    """Of whatever in `value` has a row for each image and part, those of one image."""
    if isinstance(value, Tensor):
        return value[own] if value.shape[:1] == (rows,) else value
    return _within([value], lambda values: _rows_of(values[0], own, rows))


def _together(values: Sequence[Any], parts: int) -> Any:
    """Of several images: rows beside each other, and of what has none the first's."""
    if isinstance(values[0], Tensor):
        return _joined(values) if values[0].shape[:1] == (parts,) else values[0]
    return _within(values, lambda own: _together(own, parts))


def _within(values: Sequence[Any], change: Callable[[Sequence[Any]], Any]) -> Any:
    """One group like each of `values`, of what `change` makes of the things in the same place."""
    first = values[0]
    if type(first) is dict:
        return {key: change([own[key] for own in values]) for key in first}
    if type(first) in (list, tuple):
        return type(first)(change(own) for own in zip(*values, strict=True))
    return first


def _chosen_in_turn(lists: Sequence[list[Any]]) -> list[Any]:
    """Lists [parts] of B images as one [parts * B], as `_joined` lays tensors."""
    return [own for part in zip(*lists, strict=True) for own in part]


def _runs_by_form(places: Sequence[_Place]) -> list[list[list[int]]]:
    runs: dict[Form, dict[tuple[Path, int], list[int]]] = {}
    for index, place in enumerate(places):
        runs.setdefault(place.form, {}).setdefault((place.shard, place.image), []).append(index)
    return [list(own.values()) for own in runs.values()]


def _joined(shares: Sequence[Tensor]) -> Tensor:
    """Shares [parts, ...] of B images as [parts * B, ...], the images of one part beside each other."""
    return torch.stack(list(shares), dim=1).flatten(0, 1)
