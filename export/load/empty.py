"""What the loaders of both libraries share: edits on a model without weights, and which precision is kept."""

from __future__ import annotations

from accelerate import init_empty_weights
from torch import nn

from ..apply import apply_edits_
from .config import EditsConfig


def apply_to_empty_(model: nn.Module, config: EditsConfig) -> None:
    """Change the edited modules of `model`, which has no weights and gets none."""
    with init_empty_weights(include_buffers=True):
        apply_edits_(model, config.edits, config.timesteps)


def exact_names(config: EditsConfig) -> frozenset[str]:
    """Tensors that keep their stored dtype whatever the rest is loaded in."""
    return frozenset().union(*(edit.exact() for edit in config.edits))
