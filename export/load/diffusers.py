"""Models of diffusers: built empty, edited in place, filled by diffusers itself."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from ..errors import ArtifactError
from ..runtime import PackedEmbedding
from .calls import answer_calls_
from .config import EditsConfig
from .empty import apply_to_empty_, exact_dtypes

WEIGHTS = "diffusion_pytorch_model.safetensors"


class EditsQuantizer(DiffusersQuantizer):
    """Applies the edits to the empty model, then lets diffusers fill it."""

    quantization_config: EditsConfig

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        apply_to_empty_(model, self.quantization_config)
        self.exact = exact_dtypes(model, self.quantization_config)
        model.config["quantization_config"] = self.quantization_config

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> nn.Module:
        for layer in model.modules():
            # Diffusers builds models in float32 and casts what it fills them with, which an embedding reads no input to see.
            if isinstance(layer, PackedEmbedding):
                layer.dtype = model.dtype
        answer_calls_(model)
        return model

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, *_: Any, **__: Any
    ) -> bool:
        return param_name in self.exact

    def check_quantized_param_shape(self, param_name: str, expected: Tensor, given: Tensor) -> None:
        """Called where the shapes differ only. Raises ArtifactError with both."""
        raise ArtifactError(f"{param_name} should have shape {list(expected.shape)}, but has {list(given.shape)}.")

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        *_: Any,
        **__: Any,
    ) -> None:
        # `param_value` was cast already.
        path, _dot, name = param_name.rpartition(".")
        module, value = model.get_submodule(path), state_dict[param_name].to(target_device, self.exact[param_name])
        if name in module._parameters:
            # The bias of a layer that one edit keeps exact and a later one packed.
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
        else:
            module.register_buffer(name, value)

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def build(model_class: Any, config: dict[str, Any]) -> nn.Module:
    """See `Library`; likewise the other two."""
    return model_class.from_config(config)


def held(model: nn.Module) -> dict[str, Tensor]:
    """Diffusers ties nothing."""
    return model.state_dict()


def renamed(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's own table, which changes `tensors` in place."""
    model._fix_state_dict_keys_on_load(tensors)
    return tensors
