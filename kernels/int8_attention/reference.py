"""The truth of `int8_attention`, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize_rows.reference import quantize_rows_reference


def int8_attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(s_q s_k Q(q) Q(k - mean(k))^T / sqrt(D)) v; the mean moves all scores of a query alike, which softmax undoes.

    Zhang et al. 2024, SageAttention, arXiv 2410.02367, equations 4 to 6, with one scale a token.
    """
    smooth = k.float() - k.mean(2, keepdim=True, dtype=torch.float32)
    q_codes, q_scale = quantize_rows_reference(q, None, None, 8)
    k_codes, k_scale = quantize_rows_reference(smooth, None, None, 8)
    # Sums of at most 128 products of codes are exact in float32.
    scores = q_codes.float() @ k_codes.float().transpose(2, 3)
    scores *= q_scale.view(*q.shape[:3], 1) * q.shape[3] ** -0.5
    scores *= k_scale.view(*k.shape[:2], 1, k.shape[2])
    return tokens_before_heads(q).copy_(scores.softmax(3) @ v.float())


def tokens_before_heads(q: Tensor) -> Tensor:
    """An empty output for `q` [B, H, T, D], in memory [B, T, H, D]."""
    batch, heads, tokens, columns = q.shape
    return q.new_empty((batch, tokens, heads, columns)).transpose(1, 2)
