"""Modulation collapse: what reads the time step alone walks a curve, and a few directions hold all of it.

Told of the AdaLN projections of MiniMax-H3 (FastVideo, issue 1699): one basis of their inputs over time, rank 16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import inf
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpress.export.edits import Factorize
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.runtime import factorize_layer
from diffpress.export.source import Form

from ...changes import Changes, Note, worn
from ...options import Modulation
from ...stage import Cost, Report, Running, Subject
from ...stage_folder import StageFolder
from .curves import Curves, curves_of, walk
from .low_rank import Factors, factorize, largest_error, smallest
from .time_tape import trace

REASONS = 3
"""The commonest, which are told where nothing can be done."""
CALLS = 18
"""Of the denoiser: short runs to look at and to confirm by, and finding out how short a run may be."""


class Collapsed(NamedTuple):
    """A layer in the first directions of its outputs."""

    rank: int
    error: float
    """The largest of its output, relative."""
    tensors: dict[str, Tensor]

    def changes(self, component: str, name: str, note: str) -> Changes:
        edit = Factorize(component=component, module=name, rank=self.rank)
        return Changes((edit,), {f"{name}.{key}": tensor for key, tensor in self.tensors.items()}, {name: Note(note)})


def check(subject: Subject, options: Modulation) -> None:
    """Raises UnsupportedModelError, with the reasons, where no layer gets smaller within the tolerance."""
    curves = curves_of(subject)
    reasons = dict(curves.reasons)
    for name in curves.layers:
        found = _collapse(subject, curves, name, options)
        if isinstance(found, Collapsed):
            return
        reasons[name] = found
    raise _refusal(subject.model, reasons)


def estimate(subject: Subject, options: Modulation, running: Running) -> Cost:
    """A few calls of the denoiser; what is written is smaller than what it stands for."""
    return Cost({"prune": CALLS * running.step_seconds}, sum(form.size_bytes for form in subject.forms.values()))


def run(subject: Subject, options: Modulation, folder: StageFolder, report: Report) -> Changes:
    """The method. Raises UnsupportedModelError, with the reasons, where no layer gets smaller within the tolerance."""
    curves = curves_of(subject)
    alone, reasons = dict[str, Collapsed](), dict(curves.reasons)
    for done, name in enumerate(curves.layers):
        own = _collapse(subject, curves, name, options)
        if isinstance(own, Collapsed):
            alone[name] = own
        else:
            reasons[name] = own
        report("prune", done + 1, len(curves.layers))
    found = alone
    if any(curves.feeds[name] for name in found):
        found = _together(subject, curves, found)
        if any(own.error > options.tolerance for own in found.values()):
            feeders = [name for name in found if curves.feeds[name]]
            reasons |= dict.fromkeys(
                feeders, "feeds others like it, which would err by more than the tolerance with it"
            )
            found = {name: alone[name] for name in alone if not curves.feeds[name]}
    if not found:
        raise _refusal(subject.model, reasons)
    return _changes(subject, curves, found).then(
        Changes(notes={name: Note(reason) for name, reason in reasons.items()})
    )


def _changes(subject: Subject, curves: Curves, found: Mapping[str, Collapsed]) -> Changes:
    changes = Changes()
    for name, own in found.items():
        note = f"errs by {own.error:.1e} at most, at {curves.times.count} time steps and between them"
        changes = changes.then(own.changes(subject.component, name, note))
    return changes


@torch.no_grad()
def _together(subject: Subject, curves: Curves, found: Mapping[str, Collapsed]) -> dict[str, Collapsed]:
    """The same layers with the errors that they have where all are changed: of what the ones answer others are fed."""
    (first,) = subject.conditions(1)
    with worn(subject.model, _changes(subject, curves, found), []):
        traced = trace(subject.pipeline, first, curves.sampling)
        moved = walk(traced.tape, {name: traced.fed[name] for name in found}, curves.times, subject.seed)
    errors = {}
    for name, own in found.items():
        layer = subject.model.get_submodule(name)
        expected, answers = _expected(layer, curves.layers[name].points), _stored(layer, own)(moved[name].points)
        errors[name] = largest_error(answers.double(), expected) if answers.shape == expected.shape else inf
    return {name: own._replace(error=errors[name]) for name, own in found.items()}


@torch.no_grad()
def _collapse(subject: Subject, curves: Curves, name: str, options: Modulation) -> Collapsed | str:
    """The layer in as few numbers as keep the tolerance, or the reason why it is left as it is."""
    layer, curve = subject.model.get_submodule(name), curves.layers[name]
    assert isinstance(layer, nn.Linear)
    forms = {key: form for key, form in subject.forms.items() if key.rpartition(".")[0] == name}
    factors, expected = factorize(layer.weight, layer.bias, curve.span), _expected(layer, curve.points)
    why = f"would not be smaller at rank {options.rank or 1}"
    for dtype in dict.fromkeys((forms[f"{name}.weight"].dtype, torch.float32)):
        largest = min(len(factors.down), _largest_rank(layer, forms, dtype))
        if (options.rank or 1) > largest:
            continue
        tried = partial(_tried, layer, factors, curve.points, expected, dtype)
        found = tried(options.rank or largest)
        if found.error > options.tolerance:
            most = "" if options.rank else ", the most that would be smaller"
            why = f"errs by {found.error:.1e} at rank {found.rank}{most}"
        else:
            return found if options.rank else tried(_smallest_rank(tried, largest, options.tolerance))
    return why


def _tried(
    layer: nn.Linear, factors: Factors, points: Tensor, expected: Tensor, dtype: torch.dtype, rank: int
) -> Collapsed:
    """The layer at that rank, its numbers stored in `dtype`, and how it errs at the `points` as it will be computed."""
    down, up, bias = factors.cut(rank)
    tensors = {"down.weight": down, "up.weight": up, "up.bias": bias}
    found = Collapsed(rank, 0, {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()})
    error = largest_error(_stored(layer, found)(points).double(), expected)
    return Collapsed(rank, error, {name: tensor.cpu() for name, tensor in found.tensors.items()})


def _stored(layer: nn.Module, found: Collapsed) -> nn.Module:
    """What will compute in the place of `layer`."""
    factors = factorize_layer(layer, found.rank)
    factors.load_state_dict(found.tensors)
    return factors.to(next(layer.parameters()).device)


def _expected(layer: nn.Module, points: Tensor) -> Tensor:
    """What `layer` answers to `points`, in float64."""
    assert isinstance(layer, nn.Linear)
    return F.linear(points.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())


def _smallest_rank(tried: Callable[[int], Collapsed], largest: int, tolerance: float) -> int:
    return smallest(largest, lambda rank: tried(rank).error <= tolerance)


def _largest_rank(layer: nn.Linear, forms: Mapping[str, Form], dtype: torch.dtype) -> int:
    """At which the factors, stored in `dtype`, take fewer bytes than the layer, which is stored in `forms`."""
    left = sum(form.size_bytes for form in forms.values()) - layer.out_features * dtype.itemsize
    return (left - 1) // ((layer.in_features + layer.out_features) * dtype.itemsize)


def _refusal(model: nn.Module, reasons: Mapping[str, str]) -> UnsupportedModelError:
    """What is said where no layer can be made smaller: one example of each reason, whatever the numbers in it."""
    alike: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        alike.setdefault(reason.split(" by ")[0], []).append(f"{name} {reason}")
    kinds = sorted(alike.values(), key=len, reverse=True)[:REASONS]
    why = "".join(f" {own[0]}{f', and {len(own) - 1} others like it' if len(own) > 1 else ''}." for own in kinds)
    return UnsupportedModelError(
        f"prune: modulation finds nothing in {type(model).__name__}: no layer that reads the time step alone can be made "
        f"smaller.{why} Leave prune out."
    )
