"""What people call on an edited model beside running it, where the class of the model alone would answer wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import nn

from ..edits import Edit, Resize
from ..edits.resize import Run
from ..errors import UnsupportedModelError
from ..runtime import FactorizedLinear, PackedEmbedding, PackedLayer
from .adapter_calls import LoadsAdapter, LoadsLora, MergesLora
from .config import EditsConfig
from .cuts import remember_cuts_, taken

LAYERS = (PackedLayer, FactorizedLinear)
"""What stands for a layer of floats in an edited model."""

ADAPTERS = {"load_lora_adapter": LoadsLora, "load_adapter": LoadsAdapter, "fuse_lora": MergesLora}
"""What adapters are loaded and merged by."""


def answer_calls_(model: Any) -> None:
    """Set on `model`, which has its edits and weights, the methods that have to know of them; copies and pickles keep them."""
    # Its layers guard what must not be cast, so that all other tensors may be.
    model.is_quantized = False
    edits = model.config.quantization_config.edits
    remember_cuts_(model, edits)
    if any(isinstance(module, PackedLayer) for module in model.modules()) and hasattr(model, "num_parameters"):
        model.num_parameters = CountsWeights(model)
    if any(hasattr(module, "fuse_projections") and _has_edited_child(module) for module in model.modules()):
        model.fuse_qkv_projections = Refused(
            "fuse_qkv_projections joins weights of floats, and those of this model are packed, each with scales of its own. "
            "Call diffpress.compile(pipeline) for speed, or fuse the original pipeline."
        )
    for name, answer in ADAPTERS.items():
        if hasattr(model, name):
            setattr(model, name, answer(model))
    if hasattr(model, "get_input_embeddings") and isinstance(_tokens_of(model), PackedEmbedding):
        model.get_input_embeddings = UnpacksTokens(model)
    if hasattr(model, "_load_ip_adapter_weights") and any(isinstance(edit, Resize) for edit in edits):
        model._load_ip_adapter_weights = CutsImagePrompts(model)


class Refused:
    """A method that cannot be had; it says what to do."""

    def __init__(self, sentence: str) -> None:
        self.sentence = sentence

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise UnsupportedModelError(self.sentence)


class _Answers:
    """A method of one model, in place of that of its class."""

    def __init__(self, model: Any) -> None:
        self.model = model


class CountsWeights(_Answers):
    """`num_parameters`: packed weights, which are buffers, count as those that they stand for."""

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        known: int = type(self.model).num_parameters(self.model, only_trainable, exclude_embeddings)
        packed = {layer for layer in self.model.modules() if isinstance(layer, PackedLayer)}
        counted = () if only_trainable else packed
        embeddings = PackedEmbedding if exclude_embeddings else ()
        return known + sum(prod(layer.float_shape) for layer in counted if not isinstance(layer, embeddings))


class UnpacksTokens(_Answers):
    """`get_input_embeddings`, which is asked by whoever adds tokens: from then on the table is one of floats."""

    def __call__(self) -> nn.Module | None:
        tokens = _tokens_of(self.model)
        if isinstance(tokens, PackedEmbedding):
            self.model.set_input_embeddings(tokens.in_floats())
            _forget_(self.model, tokens.edit)
        return _tokens_of(self.model)


class CutsImagePrompts(_Answers):
    """`_load_ip_adapter_weights`: an adapter's keys and values for heads that are gone go as well."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        loaded = type(self.model)._load_ip_adapter_weights(self.model, *arguments, **options)
        for edit in self.model.config.quantization_config.edits:
            parent, _dot, name = edit.module.rpartition(".")
            if isinstance(edit, Resize) and edit.outputs is not None and name in ("to_k", "to_v"):
                processor = getattr(self.model.get_submodule(parent), "processor", None)
                _cut_outputs_(getattr(processor, f"{name}_ip", None), edit.outputs)
        return loaded


def _cut_outputs_(layers: Any, kept: Sequence[Run]) -> None:
    for layer in [layers] if isinstance(layers, nn.Linear) else layers or ():
        for tensor in layer.parameters():
            tensor.data = taken(tensor.data, 0, kept)
        layer.out_features = len(layer.weight)


def _has_edited_child(module: nn.Module) -> bool:
    return any(isinstance(child, LAYERS) for child in module.children())


def _tokens_of(model: Any) -> nn.Module | None:
    """The table of tokens of a model of transformers; None where it has none, as models of pictures."""
    try:
        tokens: nn.Module = type(model).get_input_embeddings(model)
    except (NotImplementedError, AttributeError):
        return None
    return tokens


def _forget_(model: Any, edit: Edit) -> None:
    """Nothing of `edit` is left in `model`, so that it is no longer said when that is saved."""
    left: Sequence[Edit] = [own for own in model.config.quantization_config.edits if own != edit]
    config = EditsConfig.of(left, model.config.quantization_config.timesteps)
    model.config.quantization_config = model.hf_quantizer.quantization_config = config
