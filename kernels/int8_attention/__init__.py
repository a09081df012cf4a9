"""Attention whose scores are products of integers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..fused_checks import check_attention
from ..library import define_op
from .reference import int8_attention_reference, tokens_before_heads

__all__ = ["int8_attention"]


def int8_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention from `q` [B, H, T, D] to `k` and `v` [B, H, S, D], without a mask: [B, H, T, D] in their one dtype.

    q, and k less its mean over tokens, are brought to int8 with one scale a token; everything after their product is
    computed in float. The tokens of the result lie before its heads in memory, as the layer after it reads them. Raises
    ValueError naming what does not fit.
    """
    check_attention(q, k, v)
    return torch.ops.diffpress.int8_attention(q, k, v)


def _fake(q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
    return tokens_before_heads(q)


define_op(__name__, int8_attention_reference, _fake)
