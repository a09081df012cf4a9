"""Models of transformers: built empty, edited in place, filled by transformers itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.base import HfQuantizer

from ..ties import ties
from .calls import answer_calls_
from .config import EditsConfig
from .empty import apply_to_empty_, exact_dtypes

WEIGHTS = "model.safetensors"


class EditsQuantizer(HfQuantizer):
    """Applies the edits to the empty model, then lets transformers fill it."""

    quantization_config: EditsConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        apply_to_empty_(model, self.quantization_config)
        self.exact = exact_dtypes(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        answer_calls_(model)
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        return self.exact.get(converter.target_patterns[0]) or super().get_new_dtype(converter, param, dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def build(model_class: Any, config: dict[str, Any]) -> nn.Module:
    """See `Library`; likewise the other two."""
    return model_class(model_class.config_class.from_dict(config))


def held(model: Any) -> dict[str, Tensor]:
    """Without the aliases of tied ones."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in ties(model)}


def renamed(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the model's own table of conversions; an alias of a tied tensor gets the name of the one that is kept."""
    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    prefix, names = model.base_model_prefix, model.state_dict()
    result = {rename_source_key(name, renamings, converters, prefix, names)[0]: tensors[name] for name in tensors}
    return {ties(model).get(name, name): tensor for name, tensor in result.items()}
