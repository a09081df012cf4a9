"""int8_attention, its reference and its Triton kernels, against attention in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from diffpress.kernels import int8_attention
from diffpress.kernels.int8_attention.triton_kernel import launch

pytestmark = pytest.mark.usefixtures("poisoned")


class Shape(NamedTuple):
    """Sizes of one attention."""

    batch: int
    heads: int
    queries: int
    keys: int
    columns: int


SHAPES = [
    Shape(1, 1, 1, 1, 1),
    Shape(2, 3, 63, 77, 40),
    Shape(1, 1, 130, 1000, 64),
    Shape(1, 2, 100, 100, 72),
    Shape(1, 1, 64, 128, 80),
    Shape(2, 1, 77, 63, 96),
    Shape(1, 2, 65, 64, 128),
]
DTYPES = [torch.float32, torch.float16]
IMPLEMENTATIONS = {"reference": int8_attention, "triton": launch}
UNIT = 2.0**-24


def arguments(shape: Shape, dtype: torch.dtype, offset: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Heads as a projection gives them: parts of its rows. Keys share an offset, as those of diffusion models do."""
    generator = torch.Generator().manual_seed(sum(shape))

    def heads(tokens: int) -> Tensor:
        x = torch.randn(shape.batch, tokens, 2 * shape.heads * shape.columns, generator=generator)
        return x.to(dtype).chunk(2, 2)[1].unflatten(2, (shape.heads, shape.columns)).transpose(1, 2)

    k = heads(shape.keys)
    k += offset * torch.randn(shape.columns, generator=generator).to(dtype)
    return heads(shape.queries), k, heads(shape.keys)


def codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of every token, in float64 but rounded from float32."""
    scale = x.abs().amax(3, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, 1)
    return (x / scale).round().double(), scale.double()


def smoothed(k: Tensor) -> Tensor:
    return k.float() - k.mean(2, keepdim=True, dtype=torch.float32)


def rounding(weights: Tensor, v: Tensor, scores: Tensor, output: Tensor) -> Tensor:
    """By how much the kernel may miss attention with these `scores`.

    Scores are four operations of float32, exponentials wrong by a few units of themselves, and sums of S terms by S units;
    weights and result are rounded to the dtype of v, in which float16 has no less than 2**-24.
    """
    final = torch.finfo(v.dtype)
    keys = scores.shape[3]
    off = 2 * 6 * UNIT * scores.abs().amax(3, keepdim=True) + (2 * keys + 16) * UNIT + final.eps
    lost = keys * final.smallest_normal * final.eps * v.double().abs().amax()
    return off * (weights @ v.double().abs()) + final.eps * output.abs() + lost


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_is_attention_between_the_codes(implementation: str, shape: Shape, dtype: torch.dtype) -> None:
    q, k, v = arguments(shape, dtype)
    (q_codes, q_scale), (k_codes, k_scale) = codes(q.float()), codes(smoothed(k))
    scores = q_codes @ k_codes.transpose(2, 3) * q_scale * k_scale.transpose(2, 3) * shape.columns**-0.5
    weights = scores.softmax(3)
    expected = weights @ v.double()
    output = IMPLEMENTATIONS[implementation](q, k, v)
    assert (output.dtype, output.shape) == (dtype, q.shape)
    assert ((output.double() - expected).abs() <= rounding(weights, v, scores, expected)).all()


@pytest.mark.parametrize("offset", [0.0, 50.0])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_stays_near_exact_attention(implementation: str, offset: float) -> None:
    """A code misses its value by half a scale, so a score misses by no more than `missed`, and a weight by e^(2 missed)."""
    shape = SHAPES[1]
    q, k, v = arguments(shape, torch.float32, offset)
    smooth = smoothed(k)
    exact, sized = q.double(), smooth.double()
    scores = exact @ sized.transpose(2, 3) * shape.columns**-0.5
    weights = scores.softmax(3)
    expected = weights @ v.double()
    half_q, half_k = codes(q)[1] / 2, codes(smooth)[1].transpose(2, 3) / 2
    missed = half_q * sized.abs().sum(3)[:, :, None] + half_k * exact.abs().sum(3, keepdim=True)
    missed = (missed + shape.columns * half_q * half_k) * shape.columns**-0.5
    bound = (2 * missed.amax(3, keepdim=True)).expm1() * (weights @ v.double().abs())
    # Of an exact shift nothing is left in the weights, but float32 keys far from 0 are themselves rounded.
    bound = bound + rounding(weights, v, scores, expected)
    error = (IMPLEMENTATIONS[implementation](q, k, v).double() - expected).abs()
    assert (error <= bound).all()
    assert bound.mean() < v.abs().mean()


def test_kernel_and_reference_agree_wherever_the_heads_lie() -> None:
    q, k, v = arguments(SHAPES[3], torch.float32)
    # Of such keys every mean is the same, in whichever order they are added.
    k = (k * 8).round() / 8
    expected = launch(q, k, v)
    assert expected.transpose(1, 2).is_contiguous()
    assert expected.stride() == int8_attention(q, k, v).stride()
    scattered = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    assert torch.equal(launch(*scattered), expected)


def test_queries_and_keys_of_zeros_give_the_mean() -> None:
    q, k, v = arguments(SHAPES[1], torch.float32)
    expected = v.mean(2, keepdim=True).expand(q.shape)
    for output in (launch(q * 0, k, v), launch(q, torch.ones_like(k), v), launch(q * 1e-38, k, v)):
        assert torch.allclose(output, expected, rtol=0, atol=200 * UNIT)


def test_no_queries_give_nothing() -> None:
    q, k, v = arguments(SHAPES[1], torch.float32)
    assert launch(q[:, :, :0], k, v).shape == int8_attention(q[:, :, :0], k, v).shape == (2, 3, 0, 40)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("q", torch.zeros(63, 40), r"q must be floating point \[B, H, T, D\]"),
        ("q", torch.zeros(2, 3, 63, 129), "q must have heads of 1 to 128 columns, got 129"),
        ("k", torch.zeros(2, 3, 77, 41), r"k must be torch.float32 \[2, 3, S, 40\] with at least one token"),
        ("k", torch.zeros(2, 3, 0, 40), "with at least one token"),
        ("k", torch.zeros(2, 3, 77, 40, dtype=torch.float16), "k must be torch.float32"),
        ("v", torch.zeros(2, 3, 76, 40), r"v must be torch.float32 \[2, 3, 77, 40\]"),
    ],
)
def test_what_does_not_fit_is_named(name: str, value: Tensor, words: str) -> None:
    given = {**dict(zip("qkv", arguments(SHAPES[1], torch.float32), strict=True)), name: value}
    with pytest.raises(ValueError, match=words):
        int8_attention(**given)


def test_torch_compile_and_export_see_one_op() -> None:
    torch.library.opcheck(torch.ops.diffpress.int8_attention.default, arguments(SHAPES[1], torch.float16))
