"""Attention whose scores are products of integers."""

from __future__ import annotations

from torch import Tensor

from ..fused_checks import check_attention
from ..library import define_op
from .reference import int8_attention_reference, tokens_before_heads

__all__ = ["int8_attention"]


def int8_attention(q: Tensor, k: Tensor, v: Tensor, integer_values: bool = False) -> Tensor:
    """Attention from `q` [B, H, T, D] to `k` and `v` [B, H, S, D], without a mask: [B, H, T, D] in their one dtype.

    q, and k less its mean over tokens, are brought to int8 with one scale a token; softmax is float32. With
    `integer_values` its product with v is one of integers too: probabilities over the largest times 127, and v with one
    scale a channel of a head; without, everything after the first product is computed in float. The tokens of the result
    lie before its heads in memory, as the layer after it reads them. Raises ValueError naming what does not fit.
    """
    return _operation(q, k, v, integer_values)


def _check(q: Tensor, k: Tensor, v: Tensor, _integer_values: bool) -> None:
    check_attention(q, k, v)


def _fake(q: Tensor, _k: Tensor, _v: Tensor, _integer_values: bool = False) -> Tensor:
    return tokens_before_heads(q)


_operation = define_op(__name__, int8_attention_reference, _fake, on_cpu="cpu_kernel", check=_check)
