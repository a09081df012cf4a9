"""From units that go to the edits that remove them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd

import torch
from torch import Tensor, nn

from diffpress.calibration.sampling import Call, replay
from diffpress.export.edits import Resize
from diffpress.export.edits.resize import REFITTED, Run, runs_of
from diffpress.export.runtime import Wrap

from ..changes import Changes, Note, worn
from ..overlay import overlaid
from ..stage import Subject
from .structures import Removed, Structure, resizes

VISIBLE = 1e-3
"""Share of what removing units changes by which it may differ from masking them: a wrong cut differs by as much."""
ROUNDING = 64
"""Roundings of the largest output by which it may in any case: sums are added in another order."""


def cut(
    subject: Subject, structures: Sequence[Structure], removed: Removed, weights: Mapping[str, Tensor] | None = None
) -> Changes:
    """The changes that remove units; `weights` [out, kept, and 1 where there is a bias] are new ones of layers that read them,
    all of their rows.
    """
    weights = weights or {}
    edits, tensors = [], {}
    for edit in resizes(subject.component, subject.model, structures, removed):
        if edit.module in weights:
            layer = subject.model.get_submodule(edit.module)
            edit = edit.model_copy(update={"refitted": True})
            for name, value in _tensors(layer, edit, weights[edit.module]).items():
                dtype = subject.forms[f"{edit.module}.{name}"].dtype
                tensors[f"{edit.module}.{REFITTED}.{name}"] = value.to("cpu", dtype).contiguous()
        edits.append(edit)
    return Changes(tuple(edits), tensors, _notes(structures, removed))


def _tensors(layer: nn.Module, edit: Resize, matrix: Tensor) -> dict[str, Tensor]:
    """A weight and a bias, of the rows that are kept."""
    if edit.outputs is not None:
        matrix = torch.cat([matrix.narrow(0, *run) for run in edit.outputs])
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if layer.bias is None:
        return {"weight": matrix.unflatten(1, (-1, *weight.shape[2:])) if weight.ndim > 2 else matrix}
    flat = matrix[:, :-1]
    return {"weight": flat.unflatten(1, (-1, *weight.shape[2:])) if weight.ndim > 2 else flat, "bias": matrix[:, -1]}


def _notes(structures: Sequence[Structure], removed: Removed) -> dict[str, Note]:
    """What became of each structure, under its name and kind."""
    notes = {}
    for own in structures:
        gone = set(removed.get(own.name, ()))
        kept = runs_of(unit for unit in range(own.count) if unit not in gone)
        words = f"{_words(runs_of(sorted(gone)))} removed" if gone else "all kept"
        notes[f"{own.name}, {own.kind}"] = Note(words, format=own.kind, shape=(sum(n for _, n in kept), own.count))
    return notes


def _words(runs: Sequence[Run]) -> str:
    """Such as `1, 4-7`."""
    return ", ".join(f"{first}" if count == 1 else f"{first}-{first + count - 1}" for first, count in runs)


def masking(model: nn.Module, structures: Sequence[Structure], removed: Removed) -> dict[str, Wrap]:
    """What is laid around layers that read units, so that they see nothing of those that are removed."""
    masks: dict[str, Tensor] = {}
    for structure in structures:
        for part in structure.readers if removed.get(structure.name) else ():
            layer = model.get_submodule(part.module)
            mask = masks.setdefault(part.module, _ones(layer))
            mask[part.places(removed[structure.name])] = 0
    return {name: _multiplied(mask) for name, mask in masks.items()}


def _ones(layer: nn.Module) -> Tensor:
    """For each input of a layer, spread over the positions of a convolution."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    ones = torch.ones(weight.shape[1], device=weight.device)
    return ones[:, None, None] if isinstance(layer, nn.Conv2d) else ones


def _multiplied(mask: Tensor) -> Wrap:
    return lambda beneath: lambda x: beneath(x * mask.to(x))


def removable(subject: Subject, structures: Sequence[Structure], call: Call) -> tuple[list[Structure], dict[str, str]]:
    """Those of the structures that can be cut out of the model with no other change than a mask makes, and why others cannot.

    All are tried at once, and one by one where that fails.
    """
    if not structures or _cuts_as_masked(subject, structures, call) is None:
        return list(structures), {}
    reasons = {own.name: why for own in structures if (why := _cuts_as_masked(subject, [own], call)) is not None}
    return [own for own in structures if own.name not in reasons], reasons


@torch.no_grad()
def _cuts_as_masked(subject: Subject, structures: Sequence[Structure], call: Call) -> str | None:
    """Why half of the units of each, drawn at random, cannot be cut out; None where they can."""
    model, generator = subject.model, torch.Generator().manual_seed(0)
    removed = {
        own.name: sorted(torch.randperm(own.count, generator=generator)[: _about_half(own.count)].tolist())
        for own in structures
    }
    plain = replay(model, call)
    with overlaid(model, masking(model, structures, removed)):
        expected = replay(model, call)
    try:
        with worn(model, cut(subject, structures, removed), [0.0]):
            found = replay(model, call)
    except (RuntimeError, ValueError, AssertionError, IndexError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    allowed = VISIBLE * (expected - plain).abs().max() + ROUNDING * torch.finfo(plain.dtype).eps * plain.abs().max()
    return (
        None if bool((found - expected).abs().max() <= allowed) else "it answers differently without some of its units"
    )


def _about_half(count: int) -> int:
    """As many as leave a number with no divisor of `count`: what is a whole multiple may be cut wrong and fit."""
    return next(gone for gone in range(count // 2, 0, -1) if gcd(gone, count) == 1)
