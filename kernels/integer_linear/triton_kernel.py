"""Triton kernel of `integer_linear`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Form
from ..blocks import activate, tile_of, weight_tile
from ..kept import kept_with
from ..launching import given, launch_kernel
from ..packing import unpack_codes
from ..spreading import MANY_ROWS, spread_codes, spread_form
from ..tiles import Tile, is_hopper, pick, tile_depth
from .reference import integer_linear_reference

TILES = (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4), Tile(16, 64, 128, 4, 4))
"""For large outputs, for small ones, for few rows."""
TWO_SUMS_TILES = (Tile(128, 64, 64, 8, 3), *TILES[1:])
"""Where a program keeps two sums, as geglu and groups of columns need: of larger tiles they do not fit its registers."""
SMALL_HOPPER_TILES = (Tile(64, 64, 128, 4, 4), Tile(64, 32, 128, 4, 4), Tile(16, 64, 128, 4, 4))
HOPPER_TILES = (Tile(128, 128, 128, 4, 3), Tile(64, 128, 128, 4, 4), *SMALL_HOPPER_TILES)
HOPPER_TWO_SUMS_TILES = (Tile(128, 64, 128, 4, 4), *SMALL_HOPPER_TILES)
"""Those of H100 were chosen by `bench/gpu/tiles.py`."""
SHALLOWEST = 32
"""Smallest depth of a tile of int8 that tensor cores take."""


@triton.jit
def sums_of_products(
    x_pointer,
    weight_pointer,
    weight_scale_pointer,
    scale,
    zero_point_pointer,
    weight_sums_pointer,
    m,
    n,
    m_mask,
    n_mask,
    K,
    weight_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    EVEN: tl.constexpr,
    BK: tl.constexpr,
):
    """s_x s_w ((X - z) W) in float32 for rows `m` of the codes, of `scale` s_x, and rows `n` of the weight.

    What z takes away comes from sums of the weight made before (see `sums_of_columns`): summed here, the weight would have to
    pass through registers on its way to the tensor cores.
    """
    sums = tl.zeros((m.shape[0], n.shape[0]), tl.int32)
    scaled = tl.zeros((m.shape[0], n.shape[0]), tl.float32)
    zero_point = tl.load(zero_point_pointer) if HAS_ZERO else 0
    x_pointers = x_pointer + m.to(tl.int64)[:, None] * K
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x_mask = m_mask[:, None] if EVEN else m_mask[:, None] & (k < K)[None, :]
        x = tl.load(x_pointers + k[None, :], mask=x_mask, other=0)
        weight = weight_tile(weight_pointer, weight_stride, n, start, n_mask, K, BITS, EVEN, BK)
        if GROUP:
            # A tile lies within one group of columns (see `tile_depth`).
            product = tl.dot(x, weight, out_dtype=tl.int32)
            if HAS_ZERO:
                sums_pointers = weight_sums_pointer + n * tl.cdiv(K, BK) + start // BK
                product -= zero_point * tl.load(sums_pointers, mask=n_mask, other=0)[None, :]
            scale_pointers = weight_scale_pointer + n * tl.cdiv(K, GROUP) + start // GROUP
            scaled += product.to(tl.float32) * tl.load(scale_pointers, mask=n_mask, other=0)[None, :]
        else:
            sums = tl.dot(x, weight, sums, out_dtype=tl.int32)
    if GROUP:
        scaled *= scale
    else:
        if HAS_ZERO:
            sums -= zero_point * tl.load(weight_sums_pointer + n, mask=n_mask, other=0)[None, :]
        weight_scale = tl.load(weight_scale_pointer + n, mask=n_mask, other=0)[None, :]
        scaled = sums.to(tl.float32) * (scale * weight_scale)
    return scaled


@triton.jit
def integer_linear_kernel(
    x_pointer,
    weight_pointer,
    weight_scale_pointer,
    activation_scale_pointer,
    zero_point_pointer,
    weight_sums_pointer,
    bias_pointer,
    residual_pointer,
    y_pointer,
    M,
    N,
    K,
    weight_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One [BM, BN] tile of the output; of its N columns geglu makes each from rows n and N + n of the weight."""
    row, column = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN))
    m, n = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    m_mask, n_mask = m < M, n < N
    if ROW_SCALES:
        scale = tl.load(activation_scale_pointer + m, mask=m_mask, other=0)[:, None]
    else:
        scale = tl.load(activation_scale_pointer)
    value = sums_of_products(
        x_pointer, weight_pointer, weight_scale_pointer, scale, zero_point_pointer, weight_sums_pointer, m, n, m_mask, n_mask,
        K, weight_stride, BITS, GROUP, HAS_ZERO, EVEN, BK,
    )  # fmt: skip
    if HAS_BIAS:
        value += tl.load(bias_pointer + n, mask=n_mask, other=0).to(tl.float32)[None, :]
    if ACTIVATION == "geglu":
        gate = sums_of_products(
            x_pointer, weight_pointer, weight_scale_pointer, scale, zero_point_pointer, weight_sums_pointer, m, N + n, m_mask,
            n_mask, K, weight_stride, BITS, GROUP, HAS_ZERO, EVEN, BK,
        )  # fmt: skip
        if HAS_BIAS:
            gate += tl.load(bias_pointer + N + n, mask=n_mask, other=0).to(tl.float32)[None, :]
        value *= activate(gate, "gelu")
    else:
        value = activate(value, ACTIVATION)
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = m_mask[:, None] & n_mask[None, :]
    if HAS_RESIDUAL:
        value += tl.load(residual_pointer + place, mask=inside, other=0).to(tl.float32)
    tl.store(y_pointer + place, value.to(y_pointer.dtype.element_ty), mask=inside)


def launch(
    codes: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    weight_bits: int,
    group_size: int,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Compute `integer_linear` on the device of its arguments, which are known to fit; by the reference for odd groups."""
    depth = codes.shape[-1]
    rows, columns = codes.shape[:-1].numel(), len(weight) // (2 if activation == "geglu" else 1)
    y = torch.empty(*codes.shape[:-1], columns, dtype=dtype, device=codes.device)
    if y.numel() == 0:
        return y
    packed, packed_bits = weight, weight_bits
    if weight_bits < 8 and rows >= MANY_ROWS:
        weight, weight_bits = spread_codes(weight, depth, weight_bits), 8
    tile = pick(tiles_for(weight_bits, group_size, activation, is_hopper(codes.device)), rows, columns)
    deep = tile_depth(tile, group_size)
    if deep < SHALLOWEST:
        return integer_linear_reference(
            codes, weight, weight_scale, activation_scale, zero_point, bias, residual, weight_bits, group_size,
            activation, dtype,
        )  # fmt: skip
    sums = codes if zero_point is None else sums_of_columns(packed, depth, packed_bits, deep if group_size else depth)
    launch_kernel(
        integer_linear_kernel,
        (tile.programs(rows, columns),),
        codes.contiguous(),
        weight.contiguous(),
        weight_scale.contiguous(),
        activation_scale.contiguous(),
        given(zero_point, codes),
        sums,
        given(bias, codes),
        given(residual, codes),
        y,
        rows,
        columns,
        depth,
        weight.shape[1],
        BITS=weight_bits,
        GROUP=group_size,
        ROW_SCALES=activation_scale.numel() > 1,
        HAS_ZERO=zero_point is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation,
        EVEN=depth % deep == 0,
        BM=tile.rows,
        BN=tile.columns,
        BK=deep,
        warps=tile.warps,
        stages=tile.stages,
    )
    return y


def sums_of_columns(weight: Tensor, depth: int, bits: int, span: int) -> Tensor:
    """int32 [N, ceil(depth / span)]: each row of packed codes, `span` columns at a time; kept with the weight."""

    def make() -> Tensor:
        codes = unpack_codes(weight, depth, bits)
        return torch.stack([part.sum(1, dtype=torch.int32) for part in codes.split(span, 1)], 1)

    return kept_with(weight, ("sums", depth, bits, span), make)


def tiles_for(bits: int, group_size: int, activation: str, hopper: bool) -> tuple[Tile, ...]:
    """The tiles that fit the registers; weights are only read packed where there are few rows."""
    if bits < 8:
        return SMALL_HOPPER_TILES if hopper else TILES[1:]
    if group_size or activation == "geglu":
        return HOPPER_TWO_SUMS_TILES if hopper else TWO_SUMS_TILES
    return HOPPER_TILES if hopper else TILES


def forms() -> list[Form]:
    """What is compiled ahead of time: every tile at 8 bits, all that keeps two sums, and weights that are read packed."""
    spreads = [spread_form(bits, 1) for bits in (2, 3, 4)]
    return [*_forms(False, None), *_forms(True, ("sm_90",)), *spreads]


def _forms(hopper: bool, targets: tuple[str, ...] | None) -> list[Form]:
    single, double = (tiles_for(8, group_size, "none", hopper) for group_size in (0, 128))
    chosen = [(tile, 8, 0, "none") for tile in single] + [(double[0], 8, 128, "none"), (double[0], 8, 0, "geglu")]
    for tile in tiles_for(4, 0, "none", hopper):
        chosen += [(tile, 4, 0, "none"), (tile, 4, 128, "none"), (tile, 2, 0, "silu")]
    return [_form(*given)._replace(targets=targets) for given in chosen]


def _form(tile: Tile, bits: int, group_size: int, activation: str) -> Form:
    packed = "*i8" if bits == 8 else "*u8"
    pointers = ("*i8", packed, "*fp32", "*fp32", "*i32", "*i32", "*bf16", "*bf16", "*bf16")
    names = integer_linear_kernel.arg_names
    constants = {
        "BITS": bits,
        "GROUP": group_size,
        "ROW_SCALES": False,
        "HAS_ZERO": False,
        "HAS_BIAS": True,
        "HAS_RESIDUAL": False,
        "ACTIVATION": activation,
        "EVEN": True,
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile_depth(tile, group_size),
    }
    types = dict(zip(names, (*pointers, "i32", "i32", "i32", "i32"), strict=False))
    name = f"W{bits}A8 {f'groups of {group_size} ' if group_size else ''}{activation} {tile.rows}x{tile.columns}"
    return Form(name, integer_linear_kernel, types, constants, tile.warps, tile.stages, "int8")
