"""What the loaders of both libraries share: edits on a model without weights, and which precision is kept."""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from torch import nn

from ..apply import apply_edits_
from .config import EditsConfig


def apply_to_empty_(model: nn.Module, config: EditsConfig) -> None:
    """Change the edited modules of `model`, which has no weights and gets none."""
    with init_empty_weights(include_buffers=True):
        apply_edits_(model, config.edits, config.timesteps)


def exact_dtypes(model: nn.Module, config: EditsConfig) -> dict[str, torch.dtype]:
    """What the edited `model` computes with whatever the rest is loaded in; it may be stored in a narrower dtype."""
    exact = frozenset().union(*(edit.exact() for edit in config.edits))
    return {name: tensor.dtype for name, tensor in model.state_dict().items() if name in exact}
