"""Attention of one module on integers, whichever processor computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffpress.kernels import LARGEST_HEAD, int8_attention

Attention = Callable[..., Tensor]
"""Stands for `scaled_dot_product_attention`, and takes its arguments: queries [B, H, M, K], keys and values [B, H, N, K]."""


class AttentionOverride:
    """The forward of a module in which `attend` answers every call of `scaled_dot_product_attention`.

    The processors of diffusers and its native dispatch all come to that function, so that none of them has to be known. A
    mode that lasts as long as the forward lets nothing out of it, and torch.compile and export look through it. Being an
    object, it follows its module into a deep copy.
    """

    def __init__(self, forward: Callable[..., Any], attend: Attention) -> None:
        # By this name torch.export and others find the signature.
        self.__wrapped__, self.attend = forward, attend

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with _Answering(self.attend):
            return self.__wrapped__(*arguments, **options)


class _Answering(TorchFunctionMode):
    def __init__(self, attend: Attention) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(
        self,
        function: Any,
        types: Iterable[Any],
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        # The mode is off while it answers, so `attend` may call the function itself.
        if function is F.scaled_dot_product_attention:
            return self.attend(*arguments, **(options or {}))
        # torch.compile knows this one method by its name only.
        chosen = torch.unflatten if function is Tensor.unflatten else function
        return chosen(*arguments, **(options or {}))


class Int8Attention:
    """Attention by `int8_attention`, or in floats for a call that this cannot answer: [B, H, M, K] as the queries are.

    `compute` stands for the operation where that has to be learned through.
    """

    def __init__(self, integer_values: bool, compute: Callable[..., Tensor] = int8_attention) -> None:
        self.integer_values, self.compute = integer_values, compute

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if why_not_int8(query, key, value, *arguments, **options) is not None:
            return F.scaled_dot_product_attention(query, key, value, *arguments, **options)
        return self.compute(query, key, value, self.integer_values)


def why_not_int8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str | None:
    """The reason why a call of `scaled_dot_product_attention` cannot be computed on integers, or None where it can.

    It can where queries are [B, H, M, K], keys and values [B, H, N, K], and nothing else is asked for.
    """
    if attn_mask is not None or is_causal:
        return "attention mask"
    if dropout_p:
        return "dropout inside of attention"
    if scale is not None and scale != query.shape[-1] ** -0.5:
        return f"scores with a scale of their own ({scale:g})"
    if query.ndim != 4:
        return f"queries of {query.ndim} axes instead of batch, heads, tokens, columns"
    if query.shape[3] > LARGEST_HEAD:
        return f"heads of {query.shape[3]} columns, more than {LARGEST_HEAD}"
    if key.shape != value.shape or key.shape[:2] + key.shape[3:] != query.shape[:2] + query.shape[3:]:
        return "queries, keys and values in heads of different forms"
    return None


def quantize_attention_(module: nn.Module, integer_values: bool) -> None:
    """Have the attention of `module` computed by `Int8Attention`. Raises ValueError where it has none, or has it already."""
    if not computes_attention(module):
        raise ValueError(f"{type(module).__name__} has no attention processor")
    if isinstance(module.forward, AttentionOverride):
        raise ValueError("its attention is computed on integers already")
    module.forward = AttentionOverride(module.forward, Int8Attention(integer_values))


def computes_attention(module: nn.Module) -> bool:
    """Whether a module is one of those whose attention diffusers leaves to a processor."""
    return hasattr(module, "processor")


def attention_overrides(model: nn.Module) -> list[AttentionOverride]:
    """The forwards in a model that answer for attention."""
    return [module.forward for module in model.modules() if isinstance(module.forward, AttentionOverride)]
