"""int8_attention, its reference and its kernels, against attention in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from diffpress.kernels import int8_attention
from diffpress.kernels.int8_attention import cpu_kernel
from diffpress.kernels.int8_attention.triton_kernel import launch, tile_for

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
IMPLEMENTATIONS = {"reference": int8_attention, "triton": launch, "cpu": cpu_kernel.launch}
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


def values(v: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the values and the scales of their channels."""
    found, scale = codes(v.float().transpose(2, 3))
    return found.transpose(2, 3), scale.transpose(2, 3)


def probabilities(scores: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """What the codes of probabilities stand for, rounded over the largest score up to the end of a key's block; and by how
    much each may be off: by one code, where the errors of `rounding` may take it over the edge between two."""
    largest = torch.cat([part.amax(3, keepdim=True).expand(part.shape) for part in scores.split(block, 3)], 3)
    largest = largest.cummax(3).values
    exact = 127 * (scores - largest).exp()
    off = 2 * 6 * UNIT * scores.abs().amax(3, keepdim=True) + 16 * UNIT
    near = (exact - exact.floor() - 0.5).abs() <= exact * off
    unit = (largest - largest[..., -1:]).exp()
    return exact.round() * unit, near * unit


def block_of(implementation: str, columns: int, keys: int) -> int:
    return tile_for(columns, True).columns if implementation == "triton" else keys


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_integer_values_are_weighted_by_the_codes_of_probabilities(
    implementation: str, shape: Shape, dtype: torch.dtype
) -> None:
    q, k, v = arguments(shape, dtype)
    (q_codes, q_scale), (k_codes, k_scale) = codes(q.float()), codes(smoothed(k))
    scores = q_codes @ k_codes.transpose(2, 3) * q_scale * k_scale.transpose(2, 3) * shape.columns**-0.5
    weights, moved = probabilities(scores, block_of(implementation, shape.columns, shape.keys))
    v_codes, v_scale = values(v)
    total, stands_for = weights.sum(3, keepdim=True), v_codes * v_scale
    expected = weights @ stands_for / total
    output = IMPLEMENTATIONS[implementation](q, k, v, True)
    assert (output.dtype, output.shape) == (dtype, q.shape)
    # A weight that is off by one pulls the result towards its value.
    off = moved.sum(3, keepdim=True)
    pulled = (moved @ stands_for.abs() + off * expected.abs()) / (total - off)
    final = torch.finfo(dtype)
    sums = (2 * shape.keys + 16) * UNIT * (weights @ stands_for.abs()) / total
    bound = pulled + sums + final.eps * expected.abs() + final.smallest_normal * final.eps
    assert ((output.double() - expected).abs() <= bound).all()
    assert (moved > 0).double().mean() < 0.01


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_integer_values_miss_float_ones_by_half_a_code_each(implementation: str) -> None:
    """Sum of e_j (v_j - o) over sum of c_j, with e_j half a code at most, and half a scale of the values themselves."""
    shape = SHAPES[2]
    q, k, v = arguments(shape, torch.float32)
    (q_codes, q_scale), (k_codes, k_scale) = codes(q), codes(smoothed(k))
    scores = q_codes @ k_codes.transpose(2, 3) * q_scale * k_scale.transpose(2, 3) * shape.columns**-0.5
    weights, _ = probabilities(scores, block_of(implementation, shape.columns, shape.keys))
    v_codes, v_scale = values(v)
    expected = scores.softmax(3) @ v.double()
    apart = (v_codes * v_scale)[:, :, None] - (scores.softmax(3) @ (v_codes * v_scale))[:, :, :, None]
    total = weights.sum(3, keepdim=True)
    bound = apart.abs().sum(3) / 2 / total + v_scale / 2 + rounding(scores.softmax(3), v, scores, expected)
    error = IMPLEMENTATIONS[implementation](q, k, v, True).double() - expected
    assert (error.abs() <= bound).all()
    # Signs are as good as random, so that squares add up.
    assert error.square().mean() <= (apart.square().sum(3) / 4 / total.square() + v_scale.square() / 4).mean()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_codes_of_probabilities_add_up_to_one(implementation: str) -> None:
    """Whatever the scores, values that are all alike come back: the sum is that of the rounded probabilities."""
    q, k, v = arguments(SHAPES[2], torch.float32)
    alike = v[:, :, :1].expand(v.shape)
    output = IMPLEMENTATIONS[implementation](q, k, alike, True)
    assert torch.allclose(output, v[:, :, :1].expand(output.shape), rtol=2 * SHAPES[2].keys * UNIT, atol=0)


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


@pytest.mark.parametrize("integer_values", [False, True])
def test_kernel_and_reference_agree_wherever_the_heads_lie(integer_values: bool) -> None:
    q, k, v = arguments(SHAPES[3], torch.float32)
    # Of such keys every mean is the same, in whichever order they are added.
    k = (k * 8).round() / 8
    expected = launch(q, k, v, integer_values)
    assert expected.transpose(1, 2).is_contiguous()
    assert expected.stride() == int8_attention(q, k, v, integer_values).stride()
    scattered = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    assert torch.equal(launch(*scattered, integer_values), expected)


def test_queries_and_keys_of_zeros_give_the_mean() -> None:
    q, k, v = arguments(SHAPES[1], torch.float32)
    expected = v.mean(2, keepdim=True).expand(q.shape)
    for output in (launch(q * 0, k, v), launch(q, torch.ones_like(k), v), launch(q * 1e-38, k, v)):
        assert torch.allclose(output, expected, rtol=0, atol=200 * UNIT)
    half = codes(v.transpose(2, 3))[1].transpose(2, 3) / 2
    for output in (launch(q * 0, k, v, True), int8_attention(q * 0, k, v, True)):
        assert ((output - expected).abs() <= half + 200 * UNIT).all()
    assert torch.equal(launch(q, k, v * 0, True), torch.zeros_like(q))


def test_no_queries_give_nothing() -> None:
    q, k, v = arguments(SHAPES[1], torch.float32)
    for whole in (False, True):
        assert launch(q[:, :, :0], k, v, whole).shape == int8_attention(q[:, :, :0], k, v, whole).shape == (2, 3, 0, 40)


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


@pytest.mark.parametrize("integer_values", [False, True])
def test_torch_compile_and_export_see_one_op(integer_values: bool) -> None:
    given = (*arguments(SHAPES[1], torch.float16), integer_values)
    torch.library.opcheck(torch.ops.diffpress.int8_attention.default, given)
