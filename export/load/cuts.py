"""Which rows and columns a layer has lost: what was made for all of them is cut to those that are left."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..edits import Edit, Resize
from ..edits.resize import Run

CUTS = "diffpress_cuts"
"""The attribute of a layer of an edited model that says so: its `Resize` edits."""


def remember_cuts_(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Let the layers of an edited `model` know what they have lost, if anything."""
    for layer in model.modules():
        layer.__dict__[CUTS] = []
    for edit in edits:
        if isinstance(edit, Resize) and (edit.outputs is not None or edit.inputs is not None):
            layer = model.get_submodule(edit.module)
            layer.__dict__[CUTS] = [*cuts_of(layer), edit]


def cuts_of(layer: nn.Module) -> list[Resize]:
    """In their order."""
    found: list[Resize] = layer.__dict__.get(CUTS, [])
    return found


def of_edited(layer: nn.Module) -> bool:
    """Whether a layer is of an edited model."""
    return CUTS in layer.__dict__


def taken(tensor: Tensor, dimension: int, runs: Iterable[Run]) -> Tensor:
    """The kept places of one dimension."""
    return torch.cat([tensor.narrow(dimension, first, count) for first, count in runs], dimension)


def cut_branch(layer: nn.Module, tensors: MutableMapping[str, Any], prefix: str) -> None:
    """Cut the tensors of a branch, `lora_A.ADAPTER.weight` and so on behind `prefix`, that was made for the whole layer."""
    for edit in cuts_of(layer):
        for name in [name for name in tensors if name.startswith(prefix)]:
            last, size = name.removeprefix(prefix), tensors[name].shape
            if last.startswith("lora_A.") and edit.inputs is not None and size[1] != _width(layer):
                tensors[name] = taken(tensors[name], 1, edit.inputs)
            if last.startswith("lora_B.") and edit.outputs is not None and size[0] != _height(layer):
                tensors[name] = taken(tensors[name], 0, edit.outputs)


def _width(layer: Any) -> int:
    return int(layer.in_features if hasattr(layer, "in_features") else layer.in_channels)


def _height(layer: Any) -> int:
    return int(layer.out_features if hasattr(layer, "out_features") else layer.out_channels)
