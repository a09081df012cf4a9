"""block_sparse_linear, its reference and its Triton kernel, against the same layer in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffpress.kernels import block_sparse_linear, pack_blocks
from diffpress.kernels.block_sparse_linear.pack import unpack_blocks
from diffpress.kernels.block_sparse_linear.triton_kernel import launch

SHAPES = [((1,), 1, 1), ((63,), 1000, 100), ((100,), 63, 64), ((2, 65), 128, 130), ((0,), 8, 4)]
"""Leading sizes, K, N."""
DENSITIES = (0.0, 0.4, 1.0)
"""No block, some, all of them."""


def arguments(
    lead: tuple[int, ...], depth: int, rows: int, block: int, dtype: torch.dtype, density: float = 0.4
) -> tuple[dict[str, Any], Tensor]:
    """The arguments and the weight; where some blocks are kept, the last row of blocks has none."""
    generator = torch.Generator().manual_seed(depth + rows + block)
    mask = torch.rand(-(-rows // block), -(-depth // block), generator=generator) < density
    if density < 1 and len(mask) > 1:
        mask[-1] = False
    if dtype == torch.int8:
        weight = torch.randint(-128, 128, (rows, depth), dtype=dtype, generator=generator)
        x = torch.randint(-128, 128, (*lead, depth), dtype=dtype, generator=generator)
    else:
        weight = (torch.randn(rows, depth, generator=generator) / depth**0.5).to(dtype)
        x = torch.randn(*lead, depth, generator=generator).to(dtype)
    packed = pack_blocks(weight, mask, block)
    scales = None, None
    if dtype == torch.int8:
        count = x.shape[:-1].numel()
        scales = torch.rand(rows, generator=generator) / 128, (torch.rand(count, generator=generator) + 0.5) / 128
    names = ("x", "values", "column_index", "row_pointer", "weight_scale", "activation_scale", "bias")
    given = dict(zip(names, (x, *packed, *scales, torch.randn(rows, generator=generator)), strict=True))
    kept = mask.repeat_interleave(block, 0).repeat_interleave(block, 1)[:rows, :depth]
    return given, weight * kept


def truth(given: dict[str, Any], weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The output in float64, and how far from it one may be.

    A sum of K float32 terms is rounded once a term, one of integers never but when it becomes a float; two scales, their
    product with it and the bias add four, `dtype` one of its own. Triton's interpreter cuts bfloat16 off.
    """
    x, bias, terms = given["x"].double(), given["bias"].double(), given["x"].shape[-1]
    if given["weight_scale"] is not None:
        scale = given["activation_scale"].double()
        x, terms = x * (scale if scale.numel() == 1 else scale.view(*x.shape[:-1], 1)), 1
        weight = weight.double() * given["weight_scale"].double()[:, None]
    expected, reach = x @ weight.double().t() + bias, x.abs() @ weight.double().abs().t() + bias.abs()
    rounding = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)
    return expected, (terms + 4) * 2.0**-24 * reach + rounding * expected.abs() + torch.finfo(dtype).tiny


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(
    ("own", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.int8, torch.float32),
        (torch.int8, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("block", [32, pytest.param(64, marks=pytest.mark.long)])
@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize(("lead", "depth", "rows"), SHAPES)
def test_matches_float64(
    lead: tuple[int, ...],
    depth: int,
    rows: int,
    implementation: str,
    block: int,
    own: torch.dtype,
    dtype: torch.dtype,
    density: float,
) -> None:
    given, weight = arguments(lead, depth, rows, block, own, density)
    if implementation == "reference":
        output = block_sparse_linear(**given, outputs=rows, dtype=dtype)
    else:
        output = launch(*given.values(), rows, dtype)
    assert (output.dtype, output.shape) == (dtype, (*lead, rows))
    expected, allowed = truth(given, weight, dtype)
    assert ((output.double() - expected).abs() <= allowed).all()


def test_one_scale_for_all_rows() -> None:
    given, weight = arguments((9,), 100, 33, 32, torch.int8)
    given["activation_scale"] = torch.tensor([0.01])
    expected, allowed = truth(given, weight, torch.float32)
    for output in (
        block_sparse_linear(**given, outputs=33, dtype=torch.float32),
        launch(*given.values(), 33, torch.float32),
    ):
        assert ((output.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("density", DENSITIES)
def test_blocks_are_packed_row_by_row(block: int, density: float) -> None:
    given, weight = arguments((1,), 1000, 100, block, torch.float32, density)
    packed = given["values"], given["column_index"], given["row_pointer"]
    assert torch.equal(unpack_blocks(*packed, 100, 1000), weight)
    assert int(packed[2][-1]) == len(packed[0]) == len(packed[1])


def test_a_mask_that_does_not_fit_is_named() -> None:
    for mask in (torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 2)):
        with pytest.raises(ValueError, match=r"mask must be torch.bool \[2, 2\]"):
            pack_blocks(torch.ones(33, 64), mask, 32)


@pytest.mark.parametrize("own", [torch.float32, torch.int8])
def test_torch_compile_and_export_see_one_op(own: torch.dtype) -> None:
    given, _ = arguments((3, 5), 33, 40, 32, own)
    torch.library.opcheck(torch.ops.diffpress.block_sparse_linear.default, (*given.values(), 40, torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("x", torch.ones(3, 40, dtype=torch.int32), r"x must be floating point or torch.int8 \[..., K\]"),
        ("values", torch.zeros(1, 32, 32), "values must be torch.int8, as x is"),
        (
            "values",
            torch.zeros(1, 16, 16, dtype=torch.int8),
            r"values must be .* \[blocks, B, B\] with B one of \(32, 64\)",
        ),
        ("values", torch.zeros(1, 32, 64, dtype=torch.int8), "values must be"),
        ("column_index", torch.zeros(9, dtype=torch.int32), "column_index must be torch.int32"),
        ("row_pointer", torch.zeros(2, dtype=torch.int32), r"row_pointer must be torch.int32 \[3\]"),
        ("weight_scale", None, "weight_scale must be given where x is torch.int8"),
        ("weight_scale", torch.ones(5), r"weight_scale must be torch.float32 \[40\]"),
        ("activation_scale", torch.ones(2), r"activation_scale must be torch.float32 \[1\] or \[3\]"),
        ("bias", torch.ones(3), r"bias must be floating point \[40\]"),
        ("dtype", torch.int8, "dtype must be floating point"),
    ],
)
def test_what_does_not_fit_is_named(name: str, value: object, words: str) -> None:
    given, _ = arguments((3,), 40, 40, 32, torch.int8)
    with pytest.raises(ValueError, match=words):
        block_sparse_linear(**{**given, "outputs": 40, name: value})


def test_scales_of_floats_are_refused() -> None:
    given, _ = arguments((3,), 40, 40, 32, torch.float32)
    with pytest.raises(ValueError, match="activation_scale must not be given where x"):
        block_sparse_linear(**{**given, "activation_scale": torch.ones(1)}, outputs=40)
