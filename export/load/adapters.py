"""LoRA on edited models, through peft: layers of its own beside ours, named in its table of tuners once it is imported."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from diffpress.kernels import lora_linear

from ..errors import UnsupportedModelError
from ..runtime import FactorizedLinear, PackedConv2d, PackedEmbedding, PackedLinear, float_form
from .calls import LAYERS
from .cuts import cut_branch, of_edited

logger = logging.getLogger(__name__)

LARGEST_RANK = 128
"""Of a branch that the kernel beside packed weights takes."""


class _Cuts:
    """A branch of peft's in an edited model: what is read into it is cut to the rows and columns that the layer still has."""

    base_layer: Any

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        cut_branch(self.base_layer, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)  # type: ignore[misc]


class _Restores(_Cuts):
    """Beside a layer of floats, which peft would restore but for rounding."""

    merged_adapters: list[str]
    before: dict[str, Tensor] | None = None
    """Of the layer, while something is merged."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As peft does."""
        if self.before is None:
            self.before = {name: own.data.clone() for name, own in self.base_layer.named_parameters()}
        super().merge(safe_merge, adapter_names)  # type: ignore[misc]

    def unmerge(self) -> None:
        """Put back what was there, bit for bit."""
        for name, tensor in (self.before or {}).items():
            held = self.base_layer.get_parameter(name)
            held.data = tensor.to(held.device, held.dtype)
        self.before = None
        self.merged_adapters.clear()


class _Beside(_Cuts):
    """What peft's layers have to be told where the weight beside them is packed."""

    merged_adapters: list[str]
    scaling: dict[str, float]
    lora_bias: dict[str, bool]
    lora_A: nn.ModuleDict  # noqa: N815
    lora_embedding_A: nn.ParameterDict  # noqa: N815
    get_delta_weight: Callable[[str], Tensor]

    def __init__(self, base_layer: Any, adapter_name: str, **options: Any) -> None:
        """As of the layer of floats that `base_layer`, ours or one of peft's around it, stands for."""
        layer = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        super().__init__(_stand_in(layer), adapter_name, **options)  # type: ignore[call-arg]
        self.base_layer = base_layer
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.before: tuple[Tensor, Tensor] | None = None
        """Weight and scale, while something is merged."""
        self.merged_at: dict[str, float] = {}
        """How strong what is merged was then."""

    def update_layer(self, adapter_name: str, *arguments: Any, **options: Any) -> None:
        """One more adapter, made for the layer of floats."""
        layer = self.base_layer
        if isinstance(layer, LAYERS):
            self.base_layer = _stand_in(layer)
        try:
            super().update_layer(adapter_name, *arguments, **options)  # type: ignore[misc]
        finally:
            self.base_layer = layer
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def resolve_lora_variant(self, *, config: Any, **options: Any) -> Any:
        """Raises UnsupportedModelError for those that need the weight in floats, such as DoRA."""
        try:
            found = super().resolve_lora_variant(config=config, **options)  # type: ignore[misc]
        except ValueError as error:
            raise UnsupportedModelError(_VARIANT) from error
        if found is not None:
            raise UnsupportedModelError(_VARIANT)
        return None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Peft would give the branch the dtype of the weight too, which is one of 8 bits here.
        target = device or next(iter(self.base_layer.buffers()), torch.empty(0)).device
        for name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            held = getattr(self, name)
            if adapter_name in held and target.type != "meta" and not _is_meta(held[adapter_name]):
                held[adapter_name] = held[adapter_name].to(target)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Round the weight with the adapters added to it; all of it from what was stored, so that errors do not add up."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if self._knows(name)]
        if not names:
            return
        if any(self.lora_bias.get(name) for name in names):
            raise UnsupportedModelError(
                "a LoRA with a bias cannot be merged into packed layers. Leave it live: it acts so."
            )
        layer = self.base_layer
        if self.before is None:
            self.before = (layer.weight, layer.weight_scale)
        for name in names:
            self.merged_at[name] = self.scaling[name]
            self.merged_adapters.append(name)
        layer.put_(*self.before)
        error = layer.add_(self._merged_delta())
        edit = layer.edit
        logger.info(
            "%s.%s: %s merged into %s; rounding changes it by %.2g of what it adds",
            edit.component, edit.module, ", ".join(self.merged_adapters), edit.words(), error,
        )  # fmt: skip
        self.merge_error = error

    def unmerge(self) -> None:
        """Put back what was stored, bit for bit."""
        if self.before is not None:
            device = self.base_layer.weight.device
            self.base_layer.put_(*(tensor.to(device) for tensor in self.before))
        self.before = None
        self.merged_adapters.clear()
        self.merged_at.clear()

    def _knows(self, name: str) -> bool:
        return name in self.lora_A or name in self.lora_embedding_A

    def _merged_delta(self) -> Tensor:
        parts = []
        for name, strength in self.merged_at.items():
            now, self.scaling[name] = self.scaling[name], strength
            parts.append(self.get_delta_weight(name).float())
            self.scaling[name] = now
        return torch.stack(parts).sum(0)


_VARIANT = (
    "this LoRA needs weights of floats to be measured against, as DoRA does, and those here are packed. "
    "Merge it into the original pipeline, and compress that."
)


class BesidePackedLinear(_Beside, lora.Linear):
    """[..., in] to [..., out]."""

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        branch = self._branch(x) if not arguments and not options else None
        if branch is None:
            return super().forward(x, *arguments, **options)
        layer, edit = self.base_layer, self.base_layer.edit
        return lora_linear(
            x, layer.weight, layer.weight_scale, *branch[:2], layer.bias, branch[2], edit.weight_bits, edit.group_size
        )

    def _branch(self, x: Tensor) -> tuple[Any, Any, float] | None:
        """Both factors and the strength of the only adapter that acts, where one kernel computes it with the layer."""
        layer: Any = self.base_layer
        names = [name for name in self.active_adapters if name in self.lora_A]
        plain = layer.edit.activation_bits is None and layer.floats is None and layer.smoothing is None
        if not plain or not x.is_cuda or self.disable_adapters or self.merged or len(names) != 1:
            return None
        down: Any = self.lora_A[names[0]]
        up: Any = self.lora_B[names[0]]
        if down.weight.dtype != x.dtype or len(down.weight) > LARGEST_RANK or up.bias is not None or self.training:
            return None
        return down.weight, up.weight, self.scaling[names[0]]


class BesidePackedConv2d(_Beside, lora.Conv2d):
    """[B, in, H, W] to [B, out, H', W']."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """[out, in, h, w]"""
        down, up = self.lora_A[adapter].weight.float(), self.lora_B[adapter].weight.float()
        return torch.einsum("or,rihw->oihw", up.flatten(1), down) * self.scaling[adapter]


class BesidePackedEmbedding(_Beside, lora.Embedding):
    """Indices [...] to rows [..., size]."""

    def _embed(self, indices: Tensor, weight: Tensor, *_: Any) -> Tensor:
        return F.embedding(indices, weight)


class BesideFactors(_Beside, lora.Linear):
    """Beside a layer of low rank, which nothing can be merged into."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise UnsupportedModelError(
            "a LoRA on a layer of low rank cannot be merged into it, for the sum would have a higher rank. Leave it live: it "
            "acts without `fuse_lora`."
        )


class BesideLinear(_Restores, lora.Linear):
    """[..., in] to [..., out]."""


class BesideConv2d(_Restores, lora.Conv2d):
    """[B, in, H, W] to [B, out, H', W']."""


BESIDE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: BesideLinear,
    nn.Conv2d: BesideConv2d,
    PackedLinear: BesidePackedLinear,
    PackedConv2d: BesidePackedConv2d,
    PackedEmbedding: BesidePackedEmbedding,
    FactorizedLinear: BesideFactors,
}


class EditedLoraModel(lora.LoraModel):  # type: ignore[misc]
    """Peft's tuner, which knows our layers."""

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **options: Any) -> nn.Module:
        layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if of_edited(layer):
            # Not the user's own, which may be saved.
            lora_config = copy.copy(lora_config)
            lora_config._register_custom_module(BESIDE)
        made: nn.Module = lora.LoraModel._create_new_module(lora_config, adapter_name, target, **options)
        return made

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Peft asks a weight where it is; ours are moved there already.
        if isinstance(new_module, _Beside):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)


def merge_errors(model: nn.Module) -> Sequence[float]:
    """Of the packed layers of `model` that something is merged into, what rounding changed it by."""
    return [layer.merge_error for layer in model.modules() if isinstance(layer, _Beside) and layer.before is not None]


def _stand_in(layer: Any) -> nn.Module:
    """A layer of floats without any, of the form that `layer` stands for."""
    with torch.device("meta"):
        if isinstance(layer, FactorizedLinear):
            return nn.Linear(layer.in_features, layer.out_features)
        return float_form(layer)


def _is_meta(part: Any) -> bool:
    tensors = [part] if isinstance(part, Tensor) else list(part.parameters())
    return any(tensor.is_meta for tensor in tensors)
