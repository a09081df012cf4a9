"""Layers in C++ against their references, to the last bit: sums are integers, and what follows is rounded in the same order."""

from __future__ import annotations

import gc
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from diffpress.kernels import (
    code_range,
    integer_conv2d,
    integer_linear,
    pack_codes,
    quantized_conv2d,
    quantized_linear,
)
from diffpress.kernels.cpu import panel_bytes, panels, shared_library
from diffpress.kernels.integer_conv2d.reference import integer_conv2d_reference
from diffpress.kernels.integer_linear.reference import integer_linear_reference
from diffpress.kernels.kept import all_kept_with
from diffpress.kernels.quantized_conv2d.reference import quantized_conv2d_reference
from diffpress.kernels.quantized_linear.reference import quantized_linear_reference

Pair = tuple[int, int]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Case(NamedTuple):
    """Images [B, C, H, W], output channels and geometry."""

    x: tuple[int, int, int, int]
    channels: int
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)


CASES = [
    Case((1, 1, 1, 1), 1, (1, 1), padding=(0, 0)),
    Case((2, 63, 5, 7), 33),
    Case((1, 100, 9, 4), 63, (1, 1), padding=(0, 0)),
    Case((3, 5, 8, 8), 7, stride=(2, 2)),
    Case((1, 4, 11, 12), 6, padding=(2, 3), dilation=(2, 3)),
    Case((2, 3, 9, 7), 5, (5, 2), (2, 1), (1, 0), (1, 2)),
    Case((1, 8, 16, 20), 70, (4, 4), (4, 4), (0, 0)),
    Case((2, 9, 6, 6), 34, (5, 5), padding=(2, 2)),
    Case((1, 130, 6, 18), 40),
    Case((0, 4, 6, 6), 5),
]
ROWS = [((1, 1), 1), ((63, 100), 65), ((2, 7, 1003), 31), ((13, 64), 32), ((0, 8), 5), ((3, 0), 5), ((320,), 40)]


def tensors(depth: int, outputs: int, bits: int, zero: int | None, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Weight, its scale, the input's, zero point and bias."""
    generator = torch.Generator().manual_seed(depth + outputs)
    low, high = code_range(bits)
    codes = torch.randint(low, high + 1, (outputs, depth), dtype=torch.int8, generator=generator)
    scale = torch.rand(outputs, generator=generator) / high
    point = None if zero is None else torch.tensor([zero], dtype=torch.int32)
    return pack_codes(codes, bits), scale, torch.tensor([0.021]), point, torch.randn(outputs).to(dtype)


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Some beyond the codes, ties between two, and what is no ordinary number."""
    x = 1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    if x.numel() > 8:
        special = [0.0, -0.0, torch.inf, -torch.inf, 0.021 * 0.5, 0.021 * 1.5, 3e38, 1e-45]
        x.view(-1)[:8] = torch.tensor(special)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "activation_bits", "zero"), [(8, 8, None), (8, 8, -100), (4, 6, 7), (3, 8, 3)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolutions(case: Case, bits: int, activation_bits: int, zero: int | None, dtype: torch.dtype) -> None:
    depth = case.x[1] * case.kernel[0] * case.kernel[1]
    rest = (*tensors(depth, case.channels, bits, zero, dtype), *case[2:], bits, activation_bits)
    x = values(case.x, dtype)
    layouts = [x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3), x.flip(0)]
    for given in layouts:
        expected = quantized_conv2d_reference(given, *rest)
        output = quantized_conv2d(given, *rest)
        assert torch.equal(output, expected)
        assert output.stride() == expected.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "activation_bits", "zero"), [(8, 8, None), (8, 8, 127), (2, 4, -8)])
@pytest.mark.parametrize(("shape", "outputs"), ROWS, ids=str)
def test_linear_layers(
    shape: tuple[int, ...], outputs: int, bits: int, activation_bits: int, zero: int | None, dtype: torch.dtype
) -> None:
    rest = (*tensors(shape[-1], outputs, bits, zero, dtype), bits, activation_bits)
    x = values(shape, dtype)
    assert torch.equal(quantized_linear(x, *rest), quantized_linear_reference(x, *rest))
    scattered = values((shape[-1], *shape[:-1]), dtype).movedim(0, -1)
    assert torch.equal(quantized_linear(scattered, *rest), quantized_linear_reference(scattered, *rest))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu", "geglu"])
@pytest.mark.parametrize("scales", [1, 18])
def test_linear_layers_on_codes(scales: int, activation: str, dtype: torch.dtype) -> None:
    weight, weight_scale, _, zero, bias = tensors(45, 34, 8, -3, dtype)
    codes = torch.randint(-128, 128, (2, 9, 45), dtype=torch.int8)
    residual = torch.randn(2, 9, 17 if activation == "geglu" else 34).to(dtype)
    given = (codes, weight, weight_scale, torch.rand(scales), zero, bias, residual)
    options: dict[str, Any] = {"weight_bits": 8, "group_size": 0, "activation": activation, "dtype": dtype}
    assert torch.equal(integer_linear(*given, **options), integer_linear_reference(*given, **options))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_convolutions_of_codes(activation: str, dtype: torch.dtype) -> None:
    codes = torch.randint(-128, 128, (2, 7, 6, 21), dtype=torch.int8)
    residual = torch.randn(2, 4, 3, 33).to(dtype)
    geometry = {"kernel_size": [3, 3], "stride": [2, 2], "padding": [1, 1], "dilation": [1, 1]}
    options: dict[str, Any] = {**geometry, "weight_bits": 4, "activation": activation, "dtype": dtype}
    for given in (codes, codes.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
        arguments = (given, *tensors(189, 33, 4, 5, dtype), residual)
        assert torch.equal(integer_conv2d(*arguments, **options), integer_conv2d_reference(*arguments, **options))


def test_parts_of_threads_make_the_whole(threads: int) -> None:
    for outputs in (5, 200):
        rest = (*tensors(18, outputs, 8, 4, torch.float32), (3, 3), (1, 1), (1, 1), (1, 1), 8, 8)
        x = values((2, 2, 30, 31), torch.float32)
        assert torch.equal(quantized_conv2d(x, *rest), quantized_conv2d_reference(x, *rest))


WORST = {
    "all as low as they go": lambda shape: torch.full(shape, -128),
    "all as high": lambda shape: torch.full(shape, 127),
    "one high and one low": lambda shape: torch.tensor([127, -128]).repeat(shape[0], shape[1] // 2),
    "both high, then both low": lambda shape: torch.tensor([127, 127, -128, -128]).repeat(shape[0], shape[1] // 4),
    "few far from 0": lambda shape: torch.where(torch.rand(shape) < 0.1, 127, torch.randint(-30, 31, shape)),
    "anything": lambda shape: torch.randint(-128, 128, shape),
    "seven bits": lambda shape: torch.randint(-64, 64, shape),
    "six bits": lambda shape: torch.randint(-32, 32, shape),
    "five bits, the largest": lambda shape: torch.full(shape, -16),
    "four bits": lambda shape: torch.randint(-8, 8, shape),
    "four bits, the largest": lambda shape: torch.full(shape, -8),
    "two bits": lambda shape: torch.randint(-2, 2, shape),
    "nothing": lambda shape: torch.zeros(shape, dtype=torch.int64),
}
"""Weights [O, K] by what they ask of sums in 16 bits; K is a multiple of four."""


@pytest.mark.parametrize("depth", [4, 64, 1292, 20480])
@pytest.mark.parametrize("zero", [-128, 0, 127])
@pytest.mark.parametrize("weights", WORST)
def test_products_are_exact_in_the_worst_case(weights: str, zero: int, depth: int) -> None:
    """Beside int64, of codes at their ends and of any; float32 rounds the largest sums once, as it does those of int64."""
    weight = WORST[weights]((35, depth)).to(torch.int8)
    codes = torch.randint(-128, 128, (15, depth), dtype=torch.int8)
    codes[0], codes[1], codes[2, ::2], codes[2, 1::2] = -128, 127, -128, 127
    sums = (codes.long() - zero) @ weight.long().t()
    point = torch.tensor([zero], dtype=torch.int32)
    output = integer_linear(codes, weight, torch.ones(35), torch.ones(1), point, dtype=torch.float32)
    assert torch.equal(output, sums.float())


def test_weights_are_packed_once_and_anew_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, *rest = tensors(100, 40, 8, 5, torch.float32)
    assert weight is not None
    x = values((7, 100), torch.float32)
    assert panel_bytes(weight) == 0
    quantized_linear(x, weight, *rest, 8, 8)
    assert panel_bytes(weight) >= weight.numel()
    with monkeypatch.context() as context:
        context.setattr(panels, "unpack_codes", None)
        quantized_linear(x, weight, *rest, 8, 8)
    weight[3] = -weight[3]
    assert torch.equal(quantized_linear(x, weight, *rest, 8, 8), quantized_linear_reference(x, weight, *rest, 8, 8))
    # The same bytes as a convolution and in another format.
    image = values((1, 25, 4, 4), torch.float32)
    rest_of_convolution = (*rest, (2, 2), (1, 1), (0, 0), (1, 1), 8, 8)
    expected = quantized_conv2d_reference(image, weight, *rest_of_convolution)
    assert torch.equal(quantized_conv2d(image, weight, *rest_of_convolution), expected)


def test_panels_are_given_back_with_their_tensor() -> None:
    weight, *rest = tensors(100, 40, 8, 5, torch.float32)
    assert weight is not None
    quantized_linear(values((7, 100), torch.float32), weight, *rest, 8, 8)
    kept = weakref.ref(all_kept_with(weight)[0])
    assert kept() is not None
    del weight
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(("function", "said"), [("pack", "weights"), ("layer", "codes of an input")])
def test_too_little_memory_is_an_error_of_memory(monkeypatch: pytest.MonkeyPatch, function: str, said: str) -> None:
    library, weight = shared_library(), tensors(8, 4, 8, None, torch.float32)
    monkeypatch.setattr(library, f"diffpress_{function}", lambda *_: None)
    with pytest.raises(MemoryError, match=said):
        quantized_linear(torch.ones(3, 8), *weight, 8, 8)


def test_weights_of_inference_mode_may_change_unseen() -> None:
    x = values((7, 100), torch.float32)
    with torch.inference_mode():
        weight, *rest = tensors(100, 40, 8, 5, torch.float32)
        assert weight is not None
        for _ in range(2):
            expected = quantized_linear_reference(x, weight, *rest, 8, 8)
            assert torch.equal(quantized_linear(x, weight, *rest, 8, 8), expected)
            weight.neg_()


@pytest.mark.parametrize("channels_last", [False, True])
def test_torch_compile_and_export_see_one_op(channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = values((2, 5, 6, 7), torch.float32).to(memory_format=layout)
    rest = (*tensors(45, 3, 8, 2, torch.float32), [3, 3], [1, 1], [1, 1], [1, 1], 8, 8)
    torch.library.opcheck(torch.ops.diffpress.quantized_conv2d.default, (x, *rest))
    rows = (values((4, 45), torch.float32), *tensors(45, 3, 8, 2, torch.float32), 8, 8)
    torch.library.opcheck(torch.ops.diffpress.quantized_linear.default, rows)
