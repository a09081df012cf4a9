"""Loading and merging adapters on an edited model: what fits nothing is an error, and what was loaded is seen to act."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelFileError, UserError

logger = logging.getLogger(__name__)

PART = re.compile(r"(unet|prior|decoder|transformer|text_encoder|controlnet)(_\d)?\.")
"""What names of tensors in files of diffusers begin with."""
BRANCH = re.compile(r"\.(lora|lokr|alpha|dora|diff|bias$|base_layer|network_alpha).*")
"""What comes behind the name of a layer."""
OFF = "What other parts have loaded of it comes off by `unload_lora_weights()`."
LISTED = 8
"""Names that a message has at most."""


class LoadsLora:
    """`load_lora_adapter` of a model of diffusers."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, source: Any, prefix: str | None = "transformer", hotswap: bool = False, **options: Any) -> Any:
        """Raises ModelFileError where the file holds what fits no layer, or changes nothing; then nothing is loaded."""
        model, known = self.model, set(getattr(self.model, "peft_config", {}))
        if isinstance(source, dict):
            refuse_strangers(model, source, prefix)
        loaded = type(model).load_lora_adapter(model, source, prefix=prefix, hotswap=hotswap, **options)
        for name in set(getattr(model, "peft_config", {})) - known:
            refuse_idle_(model, name)
        return loaded


class LoadsAdapter:
    """`load_adapter` of a model of transformers, which pipelines load the text encoder's part of a LoRA by."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Raises ModelFileError as the other does."""
        model, known = self.model, set(getattr(self.model, "peft_config", {}))
        given = options.get("adapter_state_dict")
        if given is not None:
            refuse_strangers(model, given, None)
        loaded = type(model).load_adapter(model, *arguments, **options)
        for name in set(getattr(model, "peft_config", {})) - known:
            unread = sorted(getattr(loaded, "unexpected_keys", ()))
            if unread:
                _delete_(model, name)
                raise ModelFileError(
                    f"{len(unread)} tensors of the LoRA have names that {type(model).__name__} does not read "
                    f"({listed(unread)}). Give a file as diffusers, peft or kohya write it. {OFF}"
                )
            refuse_idle_(model, name)
        return loaded


class MergesLora:
    """`fuse_lora`: what rounding takes of it is said, and nothing is merged where something cannot be."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from .adapters import merge_errors

        try:
            merged = type(self.model).fuse_lora(self.model, *arguments, **options)
        except UserError:
            self.model.unfuse_lora()
            raise
        errors = merge_errors(self.model)
        if errors:
            logger.warning(
                "merged into %d packed layers of %s; rounding changes %.2g of what is added there, %.2g at most",
                len(errors),
                type(self.model).__name__,
                median(errors),
                max(errors),
            )
        return merged


def refuse_strangers(model: nn.Module, tensors: dict[str, Any], prefix: str | None) -> None:
    """Raises ModelFileError naming the tensors that belong to no layer of `model`, nor, by their names, to another part."""
    own = {name: name for name in tensors} if prefix is None else {}
    for name in tensors if prefix is not None else ():
        if name.startswith(f"{prefix}."):
            own[name.removeprefix(f"{prefix}.")] = name
        elif not PART.match(name):
            own[name] = name
    layers = {name for name, _ in model.named_modules()}
    strange = [name for inner, name in own.items() if layer_name(inner) not in layers]
    if strange:
        raise ModelFileError(
            f"the LoRA was made for another model: {len(strange)} of its {len(own)} tensors fit no layer of "
            f"{type(model).__name__} ({listed(strange)}). Give one that was trained on the pipeline that was compressed."
        )


def layer_name(tensor: str) -> str:
    """The layer that a tensor of an adapter is for, in the form of peft, of diffusers, or of its first versions."""
    path = BRANCH.sub("", tensor)
    old = re.fullmatch(r"(.*)\.processor\.(to_[qkv]|to_out)_lora.*", tensor)
    if old:
        path = f"{old[1]}.{old[2]}" + (".0" if old[2] == "to_out" else "")
    return path.replace(".to_out_lora", ".to_out.0")


def refuse_idle_(model: Any, adapter: str) -> None:
    """Take the adapter away again where it is on no layer, or changes what none answers. Raises ModelFileError then."""
    layers = adapted(model, adapter)
    acting = [name for name, layer in layers if moves(layer, adapter, model.dtype)]
    if acting:
        level = logging.INFO if len(acting) == len(layers) else logging.WARNING
        logger.log(
            level, "adapter %s acts on %d of %d layers of %s", adapter, len(acting), len(layers), type(model).__name__
        )
        return
    _delete_(model, adapter)
    reason = "fits no layer" if not layers else f"changes the answer of none of its {len(layers)} layers"
    raise ModelFileError(
        f"the LoRA {reason} of {type(model).__name__}. Give one that was trained on the pipeline that was compressed. {OFF}"
    )


def adapted(model: nn.Module, adapter: str) -> list[tuple[str, Any]]:
    """The layers that an adapter is on, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]
    return [(name, layer) for name, layer in layers if adapter in _names(layer)]


@torch.no_grad()
def moves(layer: Any, adapter: str, dtype: torch.dtype) -> bool:
    """Whether a layer, called with the adapter, answers otherwise than without: on numbers drawn at random."""
    base = layer.get_base_layer()
    tensors = [*base.parameters(), *base.buffers(), *layer.parameters()]
    if layer.merged or any(tensor.is_meta for tensor in tensors) or len({tensor.device for tensor in tensors}) > 1:
        # What was moved away is not fetched for this.
        return True
    x = _probe(base, dtype).to(tensors[0].device)
    active, disabled = layer._active_adapter, layer._disable_adapters
    layer._active_adapter, layer._disable_adapters = [adapter], False
    try:
        return not torch.equal(layer(x), layer.base_layer(x))
    finally:
        layer._active_adapter, layer._disable_adapters = active, disabled


def _probe(base: Any, dtype: torch.dtype) -> Tensor:
    """What a layer may be given."""
    generator = torch.Generator().manual_seed(0)
    if hasattr(base, "num_embeddings"):
        return torch.arange(base.num_embeddings)
    if hasattr(base, "kernel_size"):
        sides = [step * (size - 1) + 1 for size, step in zip(base.kernel_size, base.dilation, strict=True)]
        return torch.randn(1, base.in_channels, *sides, generator=generator).to(dtype)
    return torch.randn(1, base.in_features, generator=generator).to(dtype)


def _names(layer: Any) -> Iterable[str]:
    return {*getattr(layer, "lora_A", ()), *getattr(layer, "lora_embedding_A", ()), *getattr(layer, "lokr_w1", ())}


def _delete_(model: Any, adapter: str) -> None:
    delete = getattr(model, "delete_adapters", None) or model.delete_adapter
    delete(adapter)


def listed(names: Sequence[str]) -> str:
    """The first of many."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
