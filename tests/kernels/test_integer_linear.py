"""integer_linear, its reference and its Triton kernel, against the same layer in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from diffpress.kernels import code_range, integer_linear, pack_codes, spread_groups
from diffpress.kernels.activations import activate
from diffpress.kernels.integer_linear.triton_kernel import TILES, launch
from diffpress.kernels.tiles import tile_depth

SHAPES = [(1, 1, 1), pytest.param((63, 100, 1000), marks=pytest.mark.long), (100, 64, 63), (65, 130, 192)]
"""M, N, K; the last takes several tiles along each."""


class Case(NamedTuple):
    """A format and what follows the product."""

    bits: int
    group_size: int = 0
    zero: int | None = None
    activation: str = "none"
    dtype: torch.dtype = torch.float32


CASES = [
    Case(8),
    Case(8, zero=5, activation="silu"),
    Case(4, zero=-100, activation="gelu"),
    Case(3, activation="gelu_tanh", dtype=torch.float16),
    Case(2, dtype=torch.bfloat16),
    Case(4, 64, activation="geglu"),
    Case(8, 32, zero=3),
]


def arguments(rows: int, columns: int, depth: int, case: Case) -> dict[str, Any]:
    """Codes that use their whole range, with every optional argument."""
    generator = torch.Generator().manual_seed(rows + columns + depth)
    outputs = columns * 2 if case.activation == "geglu" else columns
    low, high = code_range(case.bits)
    weight = torch.randint(low, high + 1, (outputs, depth), dtype=torch.int8, generator=generator)
    groups = (-(-depth // case.group_size),) if case.group_size else ()
    return {
        "codes": torch.randint(-128, 128, (rows, depth), dtype=torch.int8, generator=generator),
        "weight": weight,
        "weight_scale": (torch.rand(outputs, *groups, generator=generator) + 0.5) / high / depth**0.5,
        "activation_scale": (torch.rand(rows, generator=generator) + 0.5) / 128,
        "zero_point": None if case.zero is None else torch.tensor([case.zero], dtype=torch.int32),
        "bias": torch.randn(outputs, generator=generator).to(case.dtype),
        "residual": torch.randn(rows, columns, generator=generator).to(case.dtype),
    }


def truth(given: dict[str, Any], case: Case) -> tuple[Tensor, Tensor]:
    """The output in float64, and the sum of the magnitudes of everything that is added up in it."""
    columns = given["codes"].shape[1]
    scale = given["weight_scale"].double()
    scale = spread_groups(scale, case.group_size, columns) if case.group_size else scale[:, None]
    inputs = (given["codes"].double() - (case.zero or 0)) * given["activation_scale"].double()[:, None]
    weights = given["weight"].double() * scale
    value = inputs @ weights.t() + given["bias"].double()
    magnitude = inputs.abs() @ weights.abs().t() + given["bias"].double().abs()
    if case.activation == "geglu":
        reach, gate_reach = magnitude.chunk(2, 1)
        # An error of either factor counts by the size of the other.
        magnitude = reach * gate_reach + reach
    return activate(value, case.activation) + given["residual"].double(), magnitude + given["residual"].double().abs()


def tolerance(expected: Tensor, magnitude: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """Every float32 operation may be wrong by half a unit; a sum of float32 terms, in any order, by one a term.

    Exact int32 sums count as one term. Besides `terms` there are two scales, bias, activation (whose slope is below 1.13,
    and which itself takes ten operations) and residual; then one rounding to `dtype`. Triton's interpreter cuts bfloat16
    off instead of rounding it.
    """
    rounding = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)
    return magnitude * (terms + 16) * 2.0**-24 + expected.abs() * rounding


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_it_computes_the_layer(implementation: str, shape: tuple[int, int, int], case: Case) -> None:
    given = arguments(*shape, case)
    expected, magnitude = truth(given, case)
    packed = {**given, "weight": pack_codes(given["weight"], case.bits)}
    rest = {"weight_bits": case.bits, "group_size": case.group_size, "activation": case.activation, "dtype": case.dtype}
    output = (
        integer_linear(**packed, **rest) if implementation == "reference" else launch(*packed.values(), *rest.values())
    )
    assert output.dtype == case.dtype
    terms = shape[2] if case.group_size else 1
    error = (output.double() - expected).abs()
    assert (error <= tolerance(expected, magnitude, terms, case.dtype)).all()


def test_codes_of_any_shape_and_one_scale_for_all() -> None:
    given = arguments(30, 12, 40, Case(8))
    flat = integer_linear(
        given["codes"], given["weight"], given["weight_scale"], torch.tensor([0.01]), dtype=torch.float32
    )
    folded = launch(
        given["codes"].view(2, 5, 3, 40), given["weight"], given["weight_scale"], torch.tensor([0.01]),
        None, None, None, 8, 0, "none", torch.float32,
    )  # fmt: skip
    assert folded.shape == (2, 5, 3, 12)
    assert torch.equal(folded.view(30, 12), flat)


def test_a_tile_lies_within_one_group() -> None:
    assert {tile_depth(TILES[0], size) for size in (0, 16, 32, 64, 128, 192)} == {64, 16, 32}
    assert tile_depth(TILES[0], 24) == 0


@pytest.mark.parametrize("group_size", [16, 24])
def test_groups_that_no_tile_fits_go_by_the_reference(group_size: int) -> None:
    given = arguments(7, 12, 40, Case(8, group_size))
    rest = (8, group_size, "none", torch.float32)
    assert torch.equal(launch(*given.values(), *rest), torch.ops.diffpress.integer_linear(*given.values(), *rest))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("codes", torch.zeros(3, 40), "codes must be torch.int8"),
        ("weight", torch.zeros(12, 39, dtype=torch.int8), r"weight must be torch.int8 \[N, 40\]"),
        ("weight_scale", torch.ones(11), r"weight_scale must be torch.float32 \[12\]"),
        ("activation_scale", torch.ones(2), r"activation_scale must be torch.float32 \[1\] or \[3\]"),
        ("zero_point", torch.ones(1), r"zero_point must be torch.int32 \[1\]"),
        ("bias", torch.ones(3), r"bias must be floating point \[12\]"),
        ("residual", torch.ones(3, 11), r"residual must be floating point \[3, 12\]"),
    ],
)
def test_what_does_not_fit_is_named(name: str, value: Tensor, words: str) -> None:
    given = {**arguments(3, 12, 40, Case(8)), name: value}
    with pytest.raises(ValueError, match=words):
        integer_linear(**given)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"weight_bits": 5}, "weight_bits must be 2, 3, 4 or 8"),
        ({"group_size": -1}, "group_size must be 0"),
        ({"activation": "relu"}, "activation must be one of none, gelu, gelu_tanh, silu, geglu"),
        ({"dtype": torch.int8}, "dtype must be floating point"),
    ],
)
def test_options_that_do_not_exist_are_named(option: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        integer_linear(**arguments(3, 12, 40, Case(8)), **option)


def test_torch_compile_and_export_see_one_op() -> None:
    given = arguments(3, 12, 40, Case(8))
    torch.library.opcheck(torch.ops.diffpress.integer_linear.default, (*given.values(), 8, 0, "gelu", torch.bfloat16))
