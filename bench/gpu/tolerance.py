"""By how much an operation may miss its reference: formulas of the dtype and of how many terms are added up."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from math import ceil, expm1
from typing import Any

import torch
import torch.nn.functional as F
from inputs import Arguments
from torch import Tensor

from diffpress.kernels import dequantize_groups, to_fp8, unpack_codes
from diffpress.kernels.block_sparse_linear.pack import unpack_blocks
from diffpress.kernels.int8_attention.reference import integer_scores, probability_codes
from diffpress.kernels.semi_structured_linear.pack import unpack_semi_structured

UNIT = 2.0**-23
"""Tensor cores cut float32 sums off instead of rounding them."""
HALF = (torch.float16, torch.bfloat16)
FP8_LOSS = 32 * 2.0**-13
"""H100 adds 32 products of float8 at once, each cut off 13 bits below the largest of them."""
CODES = ("quantize_rows", "norm_modulate_quantize", "group_norm_silu_quantize")
"""Operations whose results are codes."""


def reference(op: str, given: Arguments) -> Any:
    """The truth, on the device of the arguments."""
    return getattr(import_module(f"diffpress.kernels.{op}.reference"), f"{op}_reference")(**given)


def widened(given: Arguments) -> Arguments:
    """The same numbers in float32, so that the reference rounds nothing at its end."""

    def wide(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype in HALF:
            return value.float()
        return torch.float32 if isinstance(value, torch.dtype) and value in HALF else value

    return {name: wide(value) for name, value in given.items()}


def verdict(op: str, given: Arguments, output: Any) -> dict[str, Any]:
    """How far `output` lies from the reference, in units of what is allowed, and whether that is all right."""
    if op in CODES:
        return _verdict_on_codes(op, given, output)
    expected = reference(op, given if op == "int8_attention" else widened(given)).float()
    final = torch.finfo(output.dtype)
    allowed = _missed(op, given, expected) + final.eps / 2 * expected.abs() + final.smallest_normal * final.eps
    error = output.float() - expected
    worst = float((error.abs() / allowed).max())
    # Errors of single numbers may hide in a bound over long sums; all of them together may not.
    size = expected.square().mean().sqrt()
    spread = float(error.square().mean().sqrt() / size)
    together = final.eps
    if given.get("integer_values"):
        together += float(_one_code_each(given, expected).square().mean().sqrt() / size)
    found = {"worst": worst, "relative_rms": spread, "relative_rms_allowed": together}
    return {**found, "passed": output.shape == expected.shape and worst <= 1 and spread <= together}


def _verdict_on_codes(op: str, given: Arguments, output: Any) -> dict[str, Any]:
    """No code is off by more than one, and no more of them than values that lie so near an edge between two codes.

    `drift`, in codes: mean, centred value, variance and root miss by rounding errors of float32 that add up over n numbers
    to no more than 8 sqrt(n) half units (Higham and Mary 2019, doi 10.1137/18M1226312, theorem 2.4). Without a norm only the
    scale can differ: torch's CUDA kernels divide by a number by multiplying with its rounded reciprocal.
    """
    expected, scales = _pair(reference(op, given))
    codes, own_scales = _pair(output)
    drift = 127 * 4 * (1 + 8 * _numbers(op, given) ** 0.5) * 2.0**-24
    steps = (codes.int() - expected.int()).abs()
    off, most = int((steps > 0).sum()), ceil(2 * drift * codes.numel())
    scale_error = 0.0 if scales is None else float((own_scales / scales - 1).abs().max())
    found = {"largest_step": int(steps.max()), "codes_off": off, "codes_off_allowed": most, "scale_error": scale_error}
    return {**found, "passed": found["largest_step"] <= 1 and off <= most and scale_error <= drift / 127}


def _pair(output: Any) -> tuple[Tensor, Tensor | None]:
    return output if isinstance(output, tuple) else (output, None)


def _numbers(op: str, given: Arguments) -> int:
    """How many numbers a norm adds up."""
    if op == "quantize_rows":
        return 0
    x = given["x"]
    return x[0].numel() // given["groups"] if "groups" in given else x.shape[-1]


def _missed(op: str, given: Arguments, expected: Tensor) -> Tensor:
    """The error before the output is rounded."""
    if op == "int8_attention":
        return _attention_missed(given, expected)
    if op in DENSE and given.get("group_size", 1):
        return _sums_missed(op, given)
    return _exact_missed(op, given, expected)


def _exact_missed(op: str, given: Arguments, expected: Tensor) -> Tensor:
    """Sums in int32 are exact: what is left are scales, bias, the activation (ten operations, slope below 1.13), residual."""
    reach = sum(float(given[name].abs().max()) for name in ("bias", "residual") if given.get(name) is not None)
    if given.get("activation", "none") == "none":
        return 24 * UNIT * (expected.abs() + reach)
    before = reference(op, {**widened(given), "activation": "none", "residual": None}).abs() + reach
    if given["activation"] == "geglu":
        value, gate = before.chunk(2, -1)
        before = value * (gate + 1)
    return 24 * UNIT * before


def _sums_missed(op: str, given: Arguments) -> Tensor:
    """A sum misses by a unit a term, and weights that are dequantized are rounded to the dtype of x before."""
    x, weight, loss = DENSE[op](given)
    convolution = weight.ndim == 4
    if convolution:
        magnitude = F.conv2d(x.abs(), weight.abs(), None, given["stride"], given["padding"], given["dilation"])
    else:
        magnitude = F.linear(x.abs(), weight.abs())
    if "down" in given:
        low = F.linear(given["x"].float().abs(), given["down"].float().abs()) * given["branch_scale"]
        magnitude += F.linear(low, given["up"].float().abs())
    if given.get("bias") is not None:
        bias = given["bias"].float().abs()
        magnitude += bias[:, None, None] if convolution else bias
    return ((weight[0].numel() + 16) * UNIT + loss) * magnitude


def _attention_missed(given: Arguments, expected: Tensor) -> Tensor:
    """Scores are four operations, exponentials miss by a few units, sums of S terms by S; weights are rounded to v's dtype.

    The reference is rounded as well: its own half unit is added. A scale may differ in its last bit (see above), so that a
    code of each token moves by one.
    """
    q, k, v = (given[name] for name in "qkv")
    smooth = k.float() - k.float().mean(2, keepdim=True)
    score = float(q.float().norm(dim=3).max() * smooth.norm(dim=3).max()) / q.shape[3] ** 0.5
    moved = 2 * float(q.abs().max() * smooth.abs().max()) / 127 / q.shape[3] ** 0.5
    eps = torch.finfo(v.dtype).eps
    off = (12 * score + 2 * k.shape[2] + 16) * UNIT + eps + expm1(2 * moved)
    lost = k.shape[2] * torch.finfo(v.dtype).smallest_normal * eps * float(v.abs().max())
    missed = off * reference("int8_attention", {"q": q, "k": k, "v": v.abs()}).float() + eps / 2 * expected.abs() + lost
    if given["integer_values"]:
        missed += k.shape[2] ** 0.5 * _one_code_each(given, expected)
    return missed


def _one_code_each(given: Arguments, expected: Tensor) -> Tensor:
    """How far the output moves where the code of every probability is off by one, this way and that: on average over signs.

    The kernel rounds over the largest score so far, the reference over the largest of all, each by half a code of the
    latter at most. S moves that all point one way are S**0.5 times as far (Cauchy and Schwarz).
    """
    v = given["v"].float()
    spread = v.square().sum(2, keepdim=True) - 2 * expected * v.sum(2, keepdim=True) + v.shape[2] * expected.square()
    total = probability_codes(integer_scores(given["q"], given["k"])).sum(3, keepdim=True)
    return spread.clamp(min=0).sqrt() / total


Dense = tuple[Tensor, Tensor, float]
"""x, the weight, and by which part of a product the format of the operands lets it miss."""


def _weight_only(given: Arguments) -> Dense:
    x = given["x"]
    taps = given.get("kernel_size", ())
    depth = x.shape[1] * taps[0] * taps[1] if taps else x.shape[-1]
    codes = unpack_codes(given["weight"], depth, given["weight_bits"])
    weight = dequantize_groups(codes, given["weight_scale"], given["group_size"])
    shape = (len(weight), x.shape[1], *taps) if taps else weight.shape
    return x.float(), weight.view(shape), torch.finfo(x.dtype).eps


def _integers(given: Arguments) -> Dense:
    codes = given["codes"].float() * given["activation_scale"].view(-1, 1)
    weight = unpack_codes(given["weight"], codes.shape[-1], given["weight_bits"])
    return codes, dequantize_groups(weight, given["weight_scale"], given["group_size"]), 0.0


def _fp8(given: Arguments) -> Dense:
    x, weight, scale = given["x"], given["weight"].float(), given["activation_scale"]
    scale = scale if x.ndim == 4 else scale.view(-1, 1)
    weight = weight * given["weight_scale"][:, None]
    weight = weight.view(len(weight), x.shape[1], *given["kernel_size"]) if x.ndim == 4 else weight
    return to_fp8(x, scale).float() * scale, weight, FP8_LOSS


def _block_sparse(given: Arguments) -> Dense:
    x = given["x"].float()
    blocks = (given[name] for name in ("values", "column_index", "row_pointer"))
    weight = unpack_blocks(*blocks, given["outputs"], x.shape[-1]).float()
    if given["weight_scale"] is not None:
        x, weight = x * given["activation_scale"].view(-1, 1), weight * given["weight_scale"][:, None]
    return x, weight, 0.0


def _semi_structured(given: Arguments) -> Dense:
    return given["x"].float(), unpack_semi_structured(given["values"], given["positions"]).float(), 0.0


DENSE: dict[str, Callable[[Arguments], Dense]] = {
    "weight_only_linear": _weight_only,
    "weight_only_conv2d": _weight_only,
    "lora_linear": _weight_only,
    "integer_linear": _integers,
    "fp8_linear": _fp8,
    "fp8_conv2d": _fp8,
    "block_sparse_linear": _block_sparse,
    "semi_structured_linear": _semi_structured,
}
"""Operations that add up floats, `integer_linear` only where groups of columns have scales."""
