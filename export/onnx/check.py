"""A written graph against the module it came from: piece by piece, and as a whole."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir
import torch
from torch import Tensor

from diffpress.kernels.int8_attention.reference import int8_attention_reference

from ..engines.engine import Array, Engine, Session
from ..errors import ArtifactError
from ..runtime import PackedLayer
from .edges import at_edges
from .part import Part, Size
from .pieces import Piece, answering, module_of
from .rounding import attention_bound, layer_bound, model_rounding
from .trace import Place

BATCHES = (1, 3, 1)
"""Neither is the size that was traced."""
ADVICE = "Nothing was written; report this model with the versions of torch and onnxruntime."


class Agreement(NamedTuple):
    """How closely a graph follows torch, at the worst of all checked batches."""

    max_abs_error: float
    relative_error: float
    tolerance: float
    rounding: dict[str, float]
    """How far what each piece is given was off, which float rounding bounds: where codes lie at an edge."""


@torch.no_grad()
def check_graph(
    part: Part, graph: Path, places: Sequence[Place], engine: Engine, batches: Sequence[int] = BATCHES
) -> Agreement:
    """Hold the file against torch on random inputs, at the first and the last time step and between.

    1. Every piece, given what it is given in the graph, must give what torch's gives: see `rounding` for how closely.
    2. What lies between pieces, given what they give in the graph, must follow torch to float rounding.
    3. The output as users get it must follow torch's to float rounding and what codes at edges make of that.
    So no error hides behind another, and none is forgiven because codes might have moved. Raises ArtifactError.
    """
    session, generator = engine.open(graph, torch.get_num_threads()), torch.Generator().manual_seed(0)
    compared: list[tuple[float, float, float]] = []
    rounding: dict[str, float] = {}
    with opened_with_pieces(graph, places, engine) as watched:
        for inputs in examples(part, batches, generator):
            if places:
                rounding = larger(rounding, check_pieces(part, watched, places, inputs))
            compared.append(_check_whole(part, session, inputs, rounding))
    largest, error, tolerance = (max(values) for values in zip(*compared, strict=True))
    return Agreement(largest, error, tolerance, rounding)


def examples(part: Part, batches: Sequence[int], generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Random inputs at every batch size, with time steps spread evenly over the schedule from its first to its last."""
    for count, batch in enumerate(batches):
        share = count / max(len(batches) - 1, 1)
        chosen = {
            item.name: item.choices[round(share * (len(item.choices) - 1))] for item in part.inputs if item.choices
        }
        yield part.example(batch, generator) | {name: torch.tensor([value]) for name, value in chosen.items()}


@contextmanager
def opened_with_pieces(graph: Path, places: Sequence[Place], engine: Engine) -> Iterator[Session]:
    """A session of the written file that gives the values at the edges of its pieces as well."""
    model = ir.load(graph)
    values = {value.name: value for node in model.graph for value in node.outputs}
    given = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    names = dict.fromkeys(name for place in places for name in (*place.inputs, place.output) if name not in given)
    missing = sorted(names.keys() - values.keys())
    if missing:
        raise ArtifactError(f"{graph.name} has no value {missing[0]!r}, at which it would be checked. {ADVICE}")
    model.graph.outputs.extend(values[name] for name in names)
    # Beside the weights, which it shares.
    with tempfile.NamedTemporaryFile(dir=graph.parent, suffix=".onnx") as file:
        ir.save(model, file.name)
        yield engine.open(Path(file.name), torch.get_num_threads())


@dataclass
class _Comparison:
    """Torch's run of a model whose pieces answer what they answered in the graph."""

    values: Mapping[str, Tensor]
    """The graph's, by name."""
    left: list[Place]
    """Those that were not met yet."""
    rounding: float
    met: set[str] = field(default_factory=set)
    """Their outputs."""
    errors: dict[str, float] = field(default_factory=dict)

    def answer(self, piece: Piece, inputs: tuple[Tensor, ...]) -> Tensor:
        """The graph's output of the piece, once it and its inputs have been compared."""
        place = next((place for place in self.left if module_of(place.piece) == piece.module), None)
        if place is None:
            # Torch asks for what nothing depends on: a graph leaves that out.
            return piece.compute(*inputs)
        self.left.remove(place)
        self.met.add(place.output)
        given = tuple(self.values[name] for name in place.inputs)
        for name, expected, value in zip(place.inputs, inputs, given, strict=True):
            error = self.follow(f"what {piece.name} is given ({name})", value, expected)
            self.errors = larger(self.errors, {piece.module: error})
        _check_piece(piece, given, self.values[place.output])
        return self.values[place.output]

    def follow(self, what: str, output: Tensor, expected: Tensor) -> float:
        """Compare floats between pieces; returns how far they are off."""
        check_shape(what, output, expected)
        error = relative(output, expected)
        # Written so that NaN fails too.
        if not error <= self.rounding:
            raise ArtifactError(
                f"{what} differs from torch by {error:.2g} (relative root mean square), rounding explains "
                f"{self.rounding:.2g}. {ADVICE}"
            )
        return error


def check_pieces(
    part: Part, session: Session, places: Sequence[Place], inputs: Mapping[str, Tensor]
) -> dict[str, float]:
    """Compare pieces and what lies between them; returns how far what each is given is off.

    Raises ArtifactError naming the first that differs.
    """
    values = run(session, inputs)
    comparison = _Comparison(values | dict(inputs), list(places), rounding_of(part))
    with answering(part.module, comparison.answer):
        expected = part.answer(inputs)
    # Of equal calls a graph has one, which may stand for a unit's that is inherited.
    assert {place.output for place in comparison.left} <= comparison.met, f"not asked: {comparison.left}"
    comparison.follow(f"the output {part.output}", values[part.output], expected[part.output])
    return comparison.errors


def _check_piece(piece: Piece, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    owner = piece.owner
    if isinstance(owner, PackedLayer):
        expected = piece.compute(*inputs)
        check_shape(piece.name, output, expected)
        bound = layer_bound(owner, inputs[0], expected)
    else:
        # The truth: kernels of a processor may take another exponential.
        query, key, value = inputs
        expected = int8_attention_reference(query, key, value, owner.integer_values)
        check_shape(piece.name, output, expected)
        bound = attention_bound(owner, query, key, value, expected)
    error = (output - expected).abs()
    if not bool((error <= bound).all()):
        place = int((error - bound).nan_to_num(torch.inf).argmax())
        raise ArtifactError(
            f"{piece.name} differs from torch by {float(error.flatten()[place]):.2g} where rounding explains "
            f"{float(bound.flatten()[place]):.2g}. {ADVICE}"
        )


def _check_whole(
    part: Part, session: Session, inputs: Mapping[str, Tensor], rounding: Mapping[str, float]
) -> tuple[float, float, float]:
    """The largest and the relative error of the output, and the tolerance; what is given behind it is checked as well."""
    expected, outputs = part.answer(inputs), run(session, inputs)
    sizes = part.sizes()
    with at_edges(part.module, rounding):
        moved = part.answer(inputs)
    compared = []
    for name, value in expected.items():
        check_shape(f"{part.name}'s {name}", outputs[name], value)
        size = sizes.get(name, Size())
        error = relative(outputs[name], value, size.of_sum)
        tolerance = rounding_of(part) + 2 * relative(moved[name], value, size.of_sum) + size.held
        if not error <= tolerance:
            raise ArtifactError(
                f"{part.name}'s {name} differs from torch by {error:.2g} (relative root mean square), rounding explains "
                f"{tolerance:.2g}. {ADVICE}"
            )
        compared.append((float((outputs[name] - value).abs().max()), error, tolerance))
    return compared[0]


def rounding_of(part: Part) -> float:
    """See `model_rounding`."""
    return model_rounding(part.module, max((max(item.choices) for item in part.inputs if item.choices), default=0.0))


def run(session: Session, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a session, as tensors."""
    arrays: dict[str, Array] = {name: value.numpy() for name, value in inputs.items()}
    return {name: torch.from_numpy(value) for name, value in session.run(arrays).items()}


def check_shape(what: str, output: Tensor, expected: Tensor) -> None:
    if output.shape != expected.shape:
        raise ArtifactError(f"{what} is {tuple(output.shape)} where torch has {tuple(expected.shape)}. {ADVICE}")


def relative(output: Tensor, expected: Tensor, size: float | None = None) -> float:
    """Root mean square of the difference over that of `expected`, or over `size`."""
    output, expected = output.double(), expected.double()
    over = float(expected.square().mean().sqrt()) if size is None else size
    # A float32 rounding below nothing keeps an output of zeros from dividing by zero.
    return float((output - expected).square().mean().sqrt()) / max(over, torch.finfo(torch.float32).tiny)


def larger(left: Mapping[str, float], right: Mapping[str, float]) -> dict[str, float]:
    """The larger of both, by name."""
    return {name: max(left.get(name, 0.0), right.get(name, 0.0)) for name in (*left, *right)}
