"""norm_modulate_quantize, its reference and its Triton kernel, against the same in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from diffpress.kernels import code_range, norm_modulate_quantize
from diffpress.kernels.norm_modulate_quantize.triton_kernel import launch

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [(1, 1, 1), (2, 63, 100), (3, 5, 1000), (1, 7, 63), (2, 3, 4100)]
"""B, T, C."""


class Case(NamedTuple):
    """Which arguments are given."""

    norm: str = "layer"
    affine: bool = True
    modulated: bool = True
    static: bool = False
    bits: int = 8
    dtype: torch.dtype = torch.float32


CASES = [
    Case(),
    Case(static=True, dtype=torch.float16),
    Case("rms", modulated=False, bits=4),
    Case("rms", affine=False, static=True),
    Case(affine=False, modulated=False, dtype=torch.bfloat16),
]


def arguments(shape: tuple[int, int, int], case: Case) -> dict[str, Any]:
    """Inputs whose mean lies as far from 0 as they spread; the modulations are parts of one tensor."""
    generator = torch.Generator().manual_seed(sum(shape))
    batch, _, channels = shape
    modulations = torch.randn(batch, 3 * channels, generator=generator).to(case.dtype).chunk(3, 1)
    affine = torch.randn(2, channels, generator=generator).to(case.dtype)
    return {
        "x": (torch.randn(shape, generator=generator) * 2 + 2).to(case.dtype),
        "weight": affine[0] if case.affine else None,
        "bias": affine[1] if case.affine and case.norm == "layer" else None,
        "scale": modulations[0] if case.modulated else None,
        "shift": modulations[2] if case.modulated else None,
        "activation_scale": torch.tensor([3 / code_range(case.bits)[1]]) if case.static else None,
        "zero_point": torch.tensor([7], dtype=torch.int32) if case.static else None,
    }


def truth(given: dict[str, Any], case: Case, eps: float) -> tuple[Tensor, Tensor]:
    """What is quantised, in float64, and by how much float32 may miss it.

    The mean is a sum of C terms in any order, so it is wrong by C units of the largest input at most; with `offset`, that
    in units of the spread, every centred value is as well, and so are root and variance, a sum of C terms in its turn.
    """
    x = given["x"].double()
    channels, unit = x.shape[2], 2.0**-24
    largest = x.abs().amax(2, keepdim=True)
    centred = x - x.mean(2, keepdim=True) if case.norm == "layer" else x
    spread = (centred.square().mean(2, keepdim=True) + eps).sqrt()
    value = centred / spread
    offset = (channels + 2) * unit * largest / spread
    error = offset * (1 + value.abs()) + (channels + 16) * unit * value.abs()
    for name, grow in (("weight", False), ("bias", True), ("scale", False), ("shift", True)):
        if given[name] is None:
            continue
        term = given[name].double() if given[name].ndim == 1 else given[name].double()[:, None]
        factor = 1 + term if name == "scale" else term
        value = value + factor if grow else value * factor
        error = error if grow else error * factor.abs()
        error = error + 2 * unit * (value.abs() + factor.abs())
    return value, error


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_it_quantises_the_modulated_norm(implementation: str, shape: tuple[int, int, int], case: Case) -> None:
    given = arguments(shape, case)
    expected, error = truth(given, case, 1e-6)
    rest = {"norm": case.norm, "eps": 1e-6, "bits": case.bits}
    if implementation == "reference":
        codes, scales = norm_modulate_quantize(**given, **rest)
    else:
        codes, scales = launch(*given.values(), *rest.values())
    assert (codes.shape, codes.dtype) == (expected.shape, torch.int8)
    low, high = code_range(case.bits)
    zero = 7 if case.static else 0
    if case.static:
        assert torch.equal(scales, given["activation_scale"])
        steps = scales.double()
    else:
        assert scales.shape == (shape[0] * shape[1],)
        steps = scales.double().view(*shape[:2], 1)
        largest = expected.abs().amax(2, keepdim=True)
        largest = largest.where(largest > 0, high)
        assert ((steps * high - largest).abs() <= error.amax(2, keepdim=True) + largest * 2.0**-23).all()
    reachable = (expected / steps + zero).clamp(low, high)
    assert ((codes.double() - reachable).abs() <= 0.5 + error / steps + 256 * 2.0**-24).all()


def test_a_row_of_equal_numbers_is_quantised_to_the_shift() -> None:
    x = torch.full((1, 3, 64), 2.0)
    shift = torch.linspace(-1, 1, 64)[None]
    codes, scales = launch(x, None, None, None, shift, None, None, "layer", 1e-6, 8)
    assert torch.equal(codes, norm_modulate_quantize(x, shift=shift)[0])
    assert torch.equal(scales, torch.full((3,), 1 / 127))


def test_modulations_and_inputs_that_do_not_lie_in_rows() -> None:
    given = arguments((2, 6, 40), Case())
    scattered = {name: value.t().contiguous().t() for name, value in given.items() if name in ("scale", "shift")}
    scattered["x"] = given["x"].transpose(0, 2).contiguous().transpose(0, 2)
    codes, scales = launch(*{**given, **scattered}.values(), "layer", 1e-6, 8)
    assert all(map(torch.equal, (codes, scales), launch(*given.values(), "layer", 1e-6, 8)))


@pytest.mark.parametrize("static", [False, True])
def test_no_tokens_give_no_codes(static: bool) -> None:
    given = arguments((2, 0, 40), Case(static=static))
    assert all(map(torch.equal, launch(*given.values(), "layer", 1e-6, 8), norm_modulate_quantize(**given)))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("x", torch.zeros(3, 40), r"x must be floating point \[B, T, C\]"),
        ("x", torch.zeros(2, 3, 0), "x must have 1 to 16384 channels, got 0"),
        ("weight", torch.ones(39), r"weight must be floating point \[40\]"),
        ("bias", torch.ones(40, dtype=torch.int8), r"bias must be floating point \[40\]"),
        ("scale", torch.ones(40), r"scale must be floating point \[2, 40\]"),
        ("shift", torch.ones(1, 40), r"shift must be floating point \[2, 40\]"),
        ("activation_scale", torch.ones(6), r"activation_scale must be torch.float32 \[1\]"),
        ("zero_point", torch.ones(1, dtype=torch.int32), "zero_point must be None without activation_scale"),
        ("norm", "batch", "norm must be one of layer, rms, got 'batch'"),
        ("eps", 0.0, "eps must be greater than 0"),
        ("bits", 1, "bits must lie in 2..8"),
    ],
)
def test_what_does_not_fit_is_named(name: str, value: Any, words: str) -> None:
    given = {**arguments((2, 3, 40), Case()), name: value}
    with pytest.raises(ValueError, match=words):
        norm_modulate_quantize(**given)


def test_torch_compile_and_export_see_one_op() -> None:
    operation = torch.ops.diffpress.norm_modulate_quantize.default
    for case in (Case(), Case(static=True)):
        torch.library.opcheck(operation, (*arguments((2, 3, 40), case).values(), "layer", 1e-6, 8))
