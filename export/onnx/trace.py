"""A module to a graph in memory."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import onnx_ir as ir
import torch
from onnx_ir.passes.common import OutputFixPass
from torch import Tensor, nn

from ..engines.engine import Form
from ..errors import UnsupportedModelError
from .clocks import clocks_kept
from .part import Input, Part
from .pieces import Piece, answering
from .translate import translations

OPSET = 21
TRACED_BATCH = 2
"""A dynamic axis cannot be traced at size 1."""


class Place(NamedTuple):
    """Where a piece lies in its graph: names of values."""

    piece: str
    inputs: tuple[str, ...]
    output: str


class Traced(NamedTuple):
    """A graph whose first outputs are the module's; the others, by name, are what its pieces are given and give."""

    model: ir.Model
    places: list[Place]


class _Watched(nn.Module):
    """A module that gives, behind its own outputs, the inputs and outputs of all its pieces."""

    def __init__(self, module: nn.Module, outputs: Sequence[str]) -> None:
        super().__init__()
        self.module, self.outputs = module, outputs
        self.names: dict[int, str] = {}
        self.places: list[Place] = []

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        self.names, self.places, seen = {}, [], []

        def named(value: Tensor, name: str) -> str:
            # Layers may share an input, but no two outputs of a graph may be one value.
            if id(value) not in self.names:
                self.names[id(value)] = name
                seen.append(value)
            return self.names[id(value)]

        def watch(piece: Piece, inputs: tuple[Tensor, ...]) -> Tensor:
            names = tuple(named(value, f"{piece.name}:input{place}") for place, value in enumerate(inputs))
            output = piece.compute(*inputs)
            self.places.append(Place(piece.name, names, named(output, f"{piece.name}:output")))
            return output

        with answering(self.module, watch):
            given = self.module(*arguments)
        outputs = (given,) if isinstance(given, Tensor) else tuple(given)
        return *outputs, *self._others(outputs, seen)

    def _others(self, outputs: tuple[Tensor, ...], seen: list[Tensor]) -> list[Tensor]:
        """All that pieces give and are given but the module's own outputs, which a piece may give or be given too."""
        own = {self.names.pop(id(value), None): name for value, name in zip(outputs, self.outputs, strict=True)}
        self.places = [
            Place(place.piece, tuple(own.get(name, name) for name in place.inputs), own.get(place.output, place.output))
            for place in self.places
        ]
        return [value for value in seen if id(value) in self.names]


def trace(part: Part, form: Form) -> Traced:
    """The graph of a part, its batch left open. Raises UnsupportedModelError where torch cannot trace it."""
    watched = _Watched(part.module, part.outputs)
    with clocks_kept(part.module), _quiet():
        example = tuple(part.example(TRACED_BATCH, torch.Generator().manual_seed(0)).values())
        with torch.no_grad():
            watched(*example)
        outputs = [*part.outputs, *watched.names.values()]
        model = _onnx(part.name, watched, part.inputs, example, outputs, form)
    return Traced(model, watched.places)


def _onnx(
    name: str,
    module: nn.Module,
    inputs: Sequence[Input],
    example: tuple[Tensor, ...],
    outputs: Sequence[str],
    form: Form,
) -> ir.Model:
    # `forward` takes its inputs in one tuple. Given a name alone, torch finds out which batches a model takes; a `Dim` that
    # says too many is traced twice (diffusers copies before it enlarges 64 images and more).
    dynamic = (tuple({0: "batch"} if item.has_batch else None for item in inputs),)
    try:
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dynamic,
            custom_translation_table=translations(form),
            verbose=False,
            optimize=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(f"{name} cannot be exported to ONNX: torch says {reason!r}.") from error
    assert program is not None
    graph = program.model.graph
    # Pieces are given inputs of the model too, but a value has one name only.
    OutputFixPass()(program.model)
    names = (*(item.name for item in inputs), *outputs)
    for value, new in zip((*graph.inputs, *graph.outputs), names, strict=True):
        value.name = new
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    """Tracing warns about packages and about its own future, neither of which a user can do anything about."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
