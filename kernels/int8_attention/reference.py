"""The truth of `int8_attention`, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize_rows.reference import quantize_rows_reference

LARGEST_CODE = 127
"""Of a probability that is 1."""


def int8_attention_reference(q: Tensor, k: Tensor, v: Tensor, integer_values: bool = False) -> Tensor:
    """softmax(s_q s_k Q(q) Q(k - mean(k))^T / sqrt(D)) v; the mean moves all scores of a query alike, which softmax undoes.

    With `integer_values`, exp(scores - largest) is rounded to P of 0 to 127, and the result is s_v P Q(v) / sum(P).
    Zhang et al. 2024, SageAttention, arXiv 2410.02367, equations 4 to 6, with one scale a token, and one a channel of v.
    """
    scores, output = integer_scores(q, k), tokens_before_heads(q)
    if not integer_values:
        return output.copy_(scores.softmax(3) @ v.float())
    v_codes, v_scale = quantize_rows_reference(v.transpose(2, 3), None, None, 8)
    weights = probability_codes(scores)
    # Exact below 2**24, which the probabilities of a query reach where they add up to 1040 of the largest.
    sums = weights @ v_codes.float().transpose(2, 3)
    return output.copy_(sums / weights.sum(3, keepdim=True) * v_scale.view(*v.shape[:2], 1, v.shape[3]))


def integer_scores(q: Tensor, k: Tensor) -> Tensor:
    """Float32 scores [B, H, T, S] from products of codes."""
    smooth = k.float() - k.mean(2, keepdim=True, dtype=torch.float32)
    q_codes, q_scale = quantize_rows_reference(q, None, None, 8)
    k_codes, k_scale = quantize_rows_reference(smooth, None, None, 8)
    # Sums of at most 128 products of codes are exact in float32.
    scores = q_codes.float() @ k_codes.float().transpose(2, 3)
    scores *= q_scale.view(*q.shape[:3], 1) * q.shape[3] ** -0.5
    return scores.mul_(k_scale.view(*k.shape[:2], 1, k.shape[2]))


def probability_codes(scores: Tensor) -> Tensor:
    """exp(scores - largest) in whole numbers of 0 to 127, as floats, in place of the scores [..., S]."""
    return scores.sub_(scores.amax(-1, keepdim=True)).exp_().mul_(LARGEST_CODE).round_()


def tokens_before_heads(q: Tensor) -> Tensor:
    """An empty output for `q` [B, H, T, D], in memory [B, T, H, D]."""
    batch, heads, tokens, columns = q.shape
    return q.new_empty((batch, tokens, heads, columns)).transpose(1, 2)
