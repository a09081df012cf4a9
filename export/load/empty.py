"""What the loaders of both libraries share: packed layers in a model without weights, and which precision is kept."""

from __future__ import annotations

from accelerate import init_empty_weights
from torch import nn

from ..apply import apply_edits_
from ..runtime import PackedLayer
from .config import EditsConfig


def apply_to_empty_(model: nn.Module, config: EditsConfig) -> None:
    """Replace the edited modules of `model` by packed ones without weights."""
    with init_empty_weights(include_buffers=True):
        apply_edits_(model, config.edits, config.timesteps)


def exact_names(model: nn.Module) -> set[str]:
    """Tensors that keep their stored dtype whatever the rest is loaded in: all of the packed layers' but biases."""
    packed = {path: layer for path, layer in model.named_modules() if isinstance(layer, PackedLayer)}
    return {f"{path}.{name}" for path, layer in packed.items() for name in layer.state_dict() if name != "bias"}
