"""group_norm_silu_quantize, its reference and its Triton kernels, against the same in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffpress.kernels import code_range, group_norm_silu_quantize
from diffpress.kernels.group_norm_silu_quantize.triton_kernel import launch, parts_of

pytestmark = pytest.mark.usefixtures("poisoned")


class Case(NamedTuple):
    """An image and what becomes of it."""

    x: tuple[int, int, int, int]
    groups: int
    channels_last: bool = False
    zero: int | None = None
    activation: str = "silu"
    bits: int = 8
    dtype: torch.dtype = torch.float32
    smoothed: bool = False


CASES = [
    Case((1, 1, 1, 1), 1),
    Case((2, 63, 5, 7), 9, zero=-100, dtype=torch.float16, smoothed=True),
    Case((1, 100, 9, 4), 1, channels_last=True, activation="none", bits=4),
    Case((3, 40, 16, 16), 4, channels_last=True, zero=5, dtype=torch.float16),
    Case((1, 6, 100, 63), 3, dtype=torch.bfloat16),
    Case((1, 8, 50, 80), 2, channels_last=True, activation="none", smoothed=True),
]
IMPLEMENTATIONS = ["reference", "triton"]


def arguments(case: Case) -> dict[str, Any]:
    """Images whose mean lies further from 0 than they spread."""
    generator = torch.Generator().manual_seed(sum(case.x))
    x = torch.randn(case.x, generator=generator) * 0.7 - 2
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    return {
        "x": x.to(case.dtype).contiguous(memory_format=layout),
        "weight": torch.randn(case.x[1], generator=generator).to(case.dtype),
        "bias": torch.randn(case.x[1], generator=generator).to(case.dtype),
        "activation_scale": torch.tensor([2.5 / code_range(case.bits)[1]]),
        "zero_point": None if case.zero is None else torch.tensor([case.zero], dtype=torch.int32),
        "smoothing": torch.rand(case.x[1], generator=generator) + 0.5 if case.smoothed else None,
    }


def options(case: Case) -> dict[str, Any]:
    return {"groups": case.groups, "eps": 1e-5, "activation": case.activation, "bits": case.bits}


def run(implementation: str, given: dict[str, Any], case: Case) -> Tensor:
    if implementation == "reference":
        return group_norm_silu_quantize(**given, **options(case))
    return launch(*given.values(), *options(case).values())


def truth(given: dict[str, Any], case: Case) -> tuple[Tensor, Tensor]:
    """What is quantised [B, H, W, C], in float64, and by how much float32 may miss it.

    As for norms over rows, a mean of n terms in any order is wrong by n units of the largest input at most, `offset` in units
    of the spread, and the variance by n units of itself; the slope of SiLU is below 1.1, and it takes ten operations.
    """
    unit = 2.0**-24
    groups = given["x"].double().reshape(case.x[0], case.groups, -1)
    spread = (groups.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    value = (groups - groups.mean(2, keepdim=True)) / spread
    terms = groups.shape[2]
    offset = (terms + 4) * unit * groups.abs().amax(2, keepdim=True) / spread
    error = offset * (1 + value.abs()) + (terms + 16) * unit * value.abs()
    weight, bias = given["weight"].double().view(-1, 1, 1), given["bias"].double().view(-1, 1, 1)
    value, error = value.view(case.x) * weight, error.view(case.x) * weight.abs()
    error = 1.1 * error + 16 * unit * (value.abs() + bias.abs())
    value = value + bias
    value = F.silu(value) if case.activation == "silu" else value
    if given["smoothing"] is not None:
        smoothing = given["smoothing"].double().view(-1, 1, 1)
        value, error = value * smoothing, (error + unit * value.abs()) * smoothing
    return value.permute(0, 2, 3, 1), error.permute(0, 2, 3, 1)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_quantises_the_norm(implementation: str, case: Case) -> None:
    given = arguments(case)
    codes = run(implementation, given, case)
    expected, error = truth(given, case)
    assert (codes.shape, codes.dtype, codes.is_contiguous()) == (expected.shape, torch.int8, True)
    step, zero = given["activation_scale"].double(), case.zero or 0
    reachable = (expected / step + zero).clamp(*code_range(case.bits))
    assert ((codes.double() - reachable).abs() <= 0.5 + error / step + 256 * 2.0**-24).all()


def test_every_layout_gives_the_same_codes() -> None:
    given = arguments(CASES[1])
    x = given["x"]
    expected = run("triton", given, CASES[1])
    scattered = x.transpose(1, 3).contiguous().transpose(1, 3).transpose(2, 3).contiguous().transpose(2, 3)
    for other in (x.contiguous(memory_format=torch.channels_last), scattered):
        difference = run("triton", {**given, "x": other}, CASES[1]).int() - expected.int()
        # The sums are added in another order, which moves a value that lies between two codes.
        assert difference.abs().max() <= 1
        assert (difference != 0).double().mean() < 1e-3


def test_twice_the_same_gives_the_same() -> None:
    given = arguments(CASES[3])
    assert torch.equal(run("triton", given, CASES[3]), run("triton", given, CASES[3]))


def test_a_mean_far_from_0_costs_nothing() -> None:
    case = Case((1, 2, 64, 64), 1, activation="none")
    given = arguments(case)
    noise = torch.randn(case.x, generator=torch.Generator().manual_seed(0)).mul(64).round()
    # Whole numbers, which float32 holds exactly; their squares need 2**32 times what it can tell apart.
    near, far = ({**given, "x": noise + offset} for offset in (0, 2.0**22))
    difference = run("triton", near, case).int() - run("triton", far, case).int()
    assert difference.abs().max() <= 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_pictures_give_no_codes(implementation: str) -> None:
    given = arguments(CASES[1])
    assert run(implementation, {**given, "x": given["x"][:0]}, CASES[1]).shape == (0, 5, 7, 63)


def test_groups_are_cut_into_powers_of_two() -> None:
    for pixels, width, groups in ((1, 1, 1), (4096, 10, 64), (4096, 40, 32), (1000, 3, 5), (262144, 4, 32)):
        parts = parts_of(pixels, width, groups)
        assert parts.number & (parts.number - 1) == 0
        assert parts.number * parts.pixels >= pixels
        assert parts.pixels % parts.tile.pixels == 0


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("x", torch.zeros(3, 63, 5), r"x must be floating point \[B, C, H, W\]"),
        ("weight", torch.ones(62), r"weight must be floating point \[63\]"),
        ("bias", torch.ones(63, dtype=torch.int8), r"bias must be floating point \[63\]"),
        ("activation_scale", torch.ones(63), r"activation_scale must be torch.float32 \[1\]"),
        ("zero_point", torch.ones(1), r"zero_point must be torch.int32 \[1\]"),
        ("smoothing", torch.ones(63, 1, 1), r"smoothing must be floating point \[63\]"),
        ("groups", 10, "groups must divide the 63 channels of x, got 10"),
        ("eps", -1.0, "eps must be greater than 0"),
        ("activation", "gelu", "activation must be one of none, silu, got 'gelu'"),
        ("bits", 9, "bits must lie in 2..8"),
    ],
)
def test_what_does_not_fit_is_named(name: str, value: Any, words: str) -> None:
    given = {**arguments(CASES[1]), **options(CASES[1]), name: value}
    with pytest.raises(ValueError, match=words):
        group_norm_silu_quantize(**given)


def test_groups_have_a_largest_size() -> None:
    with pytest.raises(ValueError, match="groups must leave at most 4096 of the 5000 channels to each, got 1"):
        group_norm_silu_quantize(
            torch.zeros(1, 5000, 1, 1), torch.ones(5000), torch.ones(5000), torch.ones(1), groups=1
        )


def test_torch_compile_and_export_see_one_op() -> None:
    operation = torch.ops.diffpress.group_norm_silu_quantize.default
    for case in (CASES[1], CASES[2]):
        torch.library.opcheck(operation, (*arguments(case).values(), *options(case).values()))
