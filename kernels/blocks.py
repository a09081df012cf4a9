"""What the Triton kernels share: the order of their programs, tiles of packed weights, activations at the end."""

from __future__ import annotations

import triton
import triton.language as tl

ROWS_TOGETHER = tl.constexpr(8)
"""Rows of tiles that are worked on together, so that what they read stays in cache."""


@triton.jit
def tile_of(program, rows, columns):
    """Row and column of the output tile of a program: some tiles down, then one to the right."""
    width = ROWS_TOGETHER * columns
    first = program // width * ROWS_TOGETHER
    height = min(rows - first, ROWS_TOGETHER)
    return first + program % width % height, program % width // height


@triton.jit
def weight_tile(pointer, row_stride, n, start, n_mask, K, BITS: tl.constexpr, EVEN: tl.constexpr, BK: tl.constexpr):
    """int8 codes [BK, BN] of the weight's rows `n` [BN], columns from `start`, a multiple of 8, on; 0 outside.

    The format is that of `pack_codes`. EVEN: BK divides K.
    """
    rows = pointer + n.to(tl.int64) * row_stride
    k = start + tl.arange(0, BK)
    if BITS == 8:
        mask = n_mask[None, :] if EVEN else n_mask[None, :] & (k < K)[:, None]
        codes = tl.load(rows[None, :] + k[:, None], mask=mask, other=0)
    elif BITS == 4:
        # The two codes of a byte lie beside each other; the codes beyond an odd K are 0 in the byte already.
        byte = start // 2 + tl.arange(0, BK // 2)
        mask = n_mask[:, None] if EVEN else n_mask[:, None] & (byte < (K + 1) // 2)[None, :]
        packed = tl.load(rows[:, None] + byte[None, :], mask=mask, other=0).to(tl.int8, bitcast=True)
        codes = tl.trans(tl.join((packed << 4) >> 4, packed >> 4).reshape(n.shape[0], BK))
    else:
        # A code may lie across two bytes; brought to the top of an int32, its sign is repeated by the shift down.
        bit = k * BITS
        mask = n_mask[None, :] if EVEN else n_mask[None, :] & (k < K)[:, None]
        bytes = rows[None, :] + (bit // 8)[:, None]
        word = tl.load(bytes, mask=mask, other=0).to(tl.int32)
        across = mask & (bit % 8 + BITS > 8)[:, None]
        word |= tl.load(bytes + 1, mask=across, other=0).to(tl.int32) << 8
        codes = ((word << (32 - BITS - bit % 8)[:, None]) >> (32 - BITS)).to(tl.int8)
    return codes


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """GELU (exact), its tanh form, or SiLU of float32 values."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        return x * tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    return x
