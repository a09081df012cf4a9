"""Attention in C++ beside its reference; tests/kernels/test_int8_attention.py holds both to float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffpress.kernels import int8_attention
from diffpress.kernels.int8_attention.reference import int8_attention_reference

SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 13, 77, 40),
    (1, 2, 25, 33, 64),
    (1, 1, 12, 64, 128),
    (2, 2, 5, 100, 80),
    (1, 2, 30, 9, 7),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def heads(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, count, queries, keys, columns = shape
    generator = torch.Generator().manual_seed(sum(shape))
    made = (torch.randn(batch, count, tokens, columns, generator=generator) for tokens in (queries, keys, keys))
    q, k, v = (x.to(dtype) for x in made)
    return q, k, v


def tolerance(expected: Tensor, v: Tensor) -> Tensor:
    """Each is off by `rounding` of test_int8_attention.py, but for scores, which are the same: codes are, and their product.

    That leaves exponentials wrong by a few units, sums of S terms, and the rounding of the result to its dtype.
    """
    keys, final = v.shape[2], torch.finfo(v.dtype)
    return 2 * (2 * keys + 16) * 2.0**-24 * v.double().abs().amax() + final.eps * expected.double().abs() + final.tiny


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_in_integers(shape: tuple[int, ...], dtype: torch.dtype, threads: int) -> None:
    q, k, v = heads(shape, dtype)
    expected = int8_attention_reference(q, k, v)
    layouts = (
        (q, k, v),
        (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)),
        (x.mT.contiguous().mT for x in (q, k, v)),
    )
    for given in layouts:
        output = int8_attention(*given)
        assert output.stride() == expected.stride()
        assert ((output.double() - expected.double()).abs() <= tolerance(expected, v)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_in_integers(shape: tuple[int, ...], dtype: torch.dtype, threads: int) -> None:
    """The same bits: of these probabilities none lies so near the edge of a code that an exponential decides it."""
    q, k, v = heads(shape, dtype)
    assert torch.equal(int8_attention(q, k, v, True), int8_attention_reference(q, k, v, True))


def test_far_scores_weigh_nothing() -> None:
    q, k, v = heads((1, 1, 13, 40, 8), torch.float32)
    for whole in (False, True):
        assert torch.equal(int8_attention(1e4 * q, k, v, whole), int8_attention_reference(1e4 * q, k, v, whole))
        assert int8_attention(0 * q, k, v, whole).isfinite().all()


@pytest.mark.parametrize("integer_values", [False, True])
def test_torch_compile_and_export_see_one_op(integer_values: bool) -> None:
    torch.library.opcheck(
        torch.ops.diffpress.int8_attention.default, (*heads(SHAPES[1], torch.float32), integer_values)
    )
