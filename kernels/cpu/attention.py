"""One call of the C++ attention on integers."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .layer import TYPES
from .library import shared_library


class _Attention(ctypes.Structure):
    """`Attention` of attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("type", "batch", "heads", "queries", "keys", "columns")),
        *((name, 3 * ctypes.c_int64) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, ctypes.c_int64) for name in ("integer_values", "threads")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "k_mean", "output")),
    )


def compute_attention(q: Tensor, k: Tensor, v: Tensor, integer_values: bool) -> Tensor:
    """`int8_attention` of what is known to fit, and whose dtype the library `computes`."""
    library = shared_library()
    assert library is not None
    # As the reference takes it: the codes depend on its last bit.
    mean = k.mean(2, keepdim=True, dtype=torch.float32).contiguous()
    read = [tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (q, k, v)]
    batch, heads, tokens, columns = q.shape
    output = torch.empty((batch, tokens, heads, columns), dtype=q.dtype)
    attention = _Attention(
        *(TYPES[q.dtype], batch, heads, tokens, k.shape[2], columns),
        *((3 * ctypes.c_int64)(*tensor.stride()[:3]) for tensor in read),
        *(integer_values, torch.get_num_threads()),
        *(tensor.data_ptr() for tensor in (*read, mean, output)),
    )
    library.diffpress_attention(ctypes.addressof(attention))
    return output.transpose(1, 2)
