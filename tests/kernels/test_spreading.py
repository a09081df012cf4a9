"""Weights that are written out before a product of many rows, and such products."""

from __future__ import annotations

import pytest
import torch

from diffpress.kernels import (
    code_range,
    dequantize_groups,
    lora_linear,
    pack_codes,
    weight_only_conv2d,
    weight_only_linear,
)
from diffpress.kernels.integer_linear import triton_kernel as integers
from diffpress.kernels.lora_linear.triton_kernel import launch as launch_lora
from diffpress.kernels.spreading import MANY_ROWS, spread_codes, spread_floats
from diffpress.kernels.weight_only_conv2d.triton_kernel import launch as launch_conv2d
from diffpress.kernels.weight_only_linear.triton_kernel import launch as launch_weight_only

ALL_BITS = [2, 3, 4, 8]


def codes_of(bits: int, rows: int, depth: int) -> torch.Tensor:
    low, high = code_range(bits)
    return torch.randint(low, high + 1, (rows, depth), dtype=torch.int8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("taps", [1, 6, 378])
def test_codes_are_brought_into_the_order_of_their_taps(bits: int, taps: int) -> None:
    codes = codes_of(bits, 17, 378)
    found = spread_codes(pack_codes(codes, bits), 378, bits, taps)
    assert torch.equal(found, codes.view(17, 378 // taps, taps).transpose(1, 2).reshape(17, -1))


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("group_size", [32, 100, 378])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_floats_are_those_of_the_reference(bits: int, group_size: int, dtype: torch.dtype) -> None:
    codes = codes_of(bits, 17, 378)
    scale = torch.rand(17, -(-378 // group_size), generator=torch.Generator().manual_seed(1)) + 0.5
    found = spread_floats(pack_codes(codes, bits), scale, 378, bits, group_size, dtype)
    assert torch.equal(found, dequantize_groups(codes, scale, group_size).to(dtype))


@pytest.mark.parametrize("group_size", [0, 64])
@pytest.mark.parametrize("zero", [None, -7])
def test_a_product_of_many_rows_is_that_of_each(group_size: int, zero: int | None) -> None:
    x, weight = codes_of(8, MANY_ROWS + 3, 130), pack_codes(codes_of(4, 33, 130), 4)
    scales = torch.rand(33, *((3,) if group_size else ())) + 0.5, torch.rand(MANY_ROWS + 3) + 0.5
    zero_point = None if zero is None else torch.tensor([zero], dtype=torch.int32)

    def product(rows: slice) -> torch.Tensor:
        given = (x[rows], weight, scales[0], scales[1][rows], zero_point, None, None, 4, group_size, "none")
        return integers.launch(*given, torch.float32)

    together = product(slice(None))
    assert torch.equal(together, torch.cat([product(slice(0, 100)), product(slice(100, None))]))


@pytest.mark.parametrize("bias", [True, False])
def test_weights_alone_of_many_rows(bias: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, MANY_ROWS, 96, generator=generator)
    weight, scale = pack_codes(codes_of(4, 40, 96), 4), torch.rand(40, 2, generator=generator)
    offset = torch.randn(40, generator=generator) if bias else None
    given = (x, weight, scale, offset, 4, 64)
    # On the CPU both multiply the same weights by the same product of torch.
    assert torch.equal(launch_weight_only(*given), weight_only_linear(*given))
    down, up = torch.randn(5, 96, generator=generator), torch.randn(40, 5, generator=generator)
    beside = (x, weight, scale, down, up, offset, 0.5, 4, 64)
    found, expected = launch_lora(*beside), lora_linear(*beside)
    # Sums of 96 and 5 terms, in another order.
    weights = dequantize_groups(codes_of(4, 40, 96), scale, 64)
    magnitude = x.abs() @ weights.abs().T + 0.5 * (x.abs() @ down.abs().T @ up.abs().T) + 10
    assert ((found - expected).abs() <= 2 * 101 * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("rows", [16, MANY_ROWS])
def test_autocast_leaves_the_dtype_alone(rows: int) -> None:
    x, weight, scale = torch.ones(rows, 96), pack_codes(codes_of(4, 40, 96), 4), torch.ones(40, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert launch_weight_only(x, weight, scale, None, 4, 64).dtype == torch.float32


@pytest.mark.parametrize("rows", [3, MANY_ROWS])
def test_without_columns_the_bias_is_left(rows: int) -> None:
    weight, bias = torch.zeros(40, 0, dtype=torch.uint8), torch.arange(40.0)
    found = launch_weight_only(torch.ones(rows, 0), weight, torch.ones(40, 0), bias, 4, 64)
    assert torch.equal(found, bias.expand(rows, 40))


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_of_weights_alone(kernel: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x, depth = torch.randn(2, 12, 9, 7, generator=generator), 12 * kernel**2
    weight, scale = pack_codes(codes_of(4, 10, depth), 4), torch.rand(10, -(-depth // 64), generator=generator)
    sizes = ([kernel] * 2, [1, 2], [kernel // 2] * 2, [1, 1])
    given = (x, weight, scale, torch.randn(10, generator=generator), *sizes, 4, 64)
    found, expected = launch_conv2d(*given), weight_only_conv2d(*given)
    assert torch.equal(found, expected)
    # As what is told to the compiler.
    last = (x.to(memory_format=torch.channels_last), *given[1:])
    assert launch_conv2d(*last).is_contiguous()
    assert weight_only_conv2d(*last).is_contiguous()
