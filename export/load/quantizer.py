"""Our entry in diffusers' table of quantizers: edits ride in a component's config.json and are applied before its weights."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from pydantic import TypeAdapter
from torch import Tensor, nn

from ..apply import apply_edits_
from ..edits import Edit
from .method import METHOD

EDITS: TypeAdapter[list[Edit]] = TypeAdapter(list[Edit])


EXACT = ("weight_scale", "activation_scale")
"""Tensors that stay in the precision they are stored in, whatever dtype the rest is loaded in."""


class Method(str, Enum):  # noqa: UP042  # diffusers compares it as a plain str and reads its value
    """Our one entry in diffusers' tables."""

    DIFFPRESS = METHOD


class EditsConfig(QuantizationConfigMixin):
    """The `quantization_config` of an edited component."""

    def __init__(self, edits: list[Any], timesteps: list[float], quant_method: str = Method.DIFFPRESS.value) -> None:
        self.quant_method = Method(quant_method)
        self.edits = EDITS.validate_python(edits)
        self.timesteps = timesteps

    def to_dict(self) -> dict[str, Any]:
        edits = EDITS.dump_python(self.edits, mode="json")
        return {"quant_method": self.quant_method.value, "timesteps": self.timesteps, "edits": edits}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class EditsQuantizer(DiffusersQuantizer):
    """Applies the edits to the empty model, then lets diffusers fill it."""

    quantization_config: EditsConfig

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        with init_empty_weights(include_buffers=True):
            apply_edits_(model, self.quantization_config.edits, self.quantization_config.timesteps)
        model.config["quantization_config"] = self.quantization_config

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        return model

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **_: Any
    ) -> bool:
        return param_name.rsplit(".", 1)[-1] in EXACT

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
        path, _dot, name = param_name.rpartition(".")
        model.get_submodule(path).register_buffer(name, state_dict[param_name].to(target_device))

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
