"""What works on this machine: every kernel is run once, not guessed."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from diffpress.export.edits import Pack
from diffpress.export.runtime import LayerForm, layer_times, loses
from diffpress.kernels import (
    block_sparse_linear,
    fp8_conv2d,
    fp8_linear,
    group_norm_silu_quantize,
    int8_attention,
    lora_linear,
    norm_modulate_quantize,
    pack_blocks,
    pack_codes,
    pack_semi_structured,
    quantize_rows,
    quantized_conv2d,
    quantized_linear,
    semi_structured_linear,
    weight_only_conv2d,
    weight_only_linear,
)
from diffpress.kernels.answering import answering_kernels
from diffpress.kernels.processor import why_no_byte_products

from .doctor_engines import ENGINES

PACKAGES = (
    "diffpress",
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
)
SIZE = 64
"""Input and output channels of the layers that are tried."""
POINTWISE = ((1, 1), (1, 1), (0, 0), (1, 1))
"""Kernel size, stride, padding and dilation of a convolution that is a linear layer at every position."""

TYPICAL = [
    LayerForm(Pack(component="", module="", **bits), shape, shape[1], torch.float32, geometry)
    for bits in (
        {"weight_bits": 8, "activation_bits": 8},
        {"weight_bits": 4, "activation_bits": 8},
        {"weight_bits": 4, "activation_bits": None, "group_size": SIZE},
    )
    for shape, geometry in (
        ((1024, 512), ()),
        ((1, 1024), ()),
        ((1, 256, 16, 16), ((3, 3), (1, 1), (1, 1), (1, 1))),
    )
]
"""Layers that are timed: of many rows, of one, and a convolution."""


def examine() -> dict[str, str]:
    """A finding a line: versions, and for every backend and kernel `works` or `fails: why`."""
    findings = {"machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"}
    findings |= {name: _version(name) for name in PACKAGES}
    findings["kernels"] = ", ".join(f"{answering_kernels(device)} on {device}" for device in ("cpu", "cuda"))
    findings["integer products of the references"] = _products()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for bits in (8, 4, 3, 2):
            findings[f"quantized layers W{bits}A8 on {device}"] = _try(partial(_quantized, bits, device))
            findings[f"weight-only layers W{bits} on {device}"] = _try(partial(_weight_only, bits, device))
        findings[f"float8 layers on {device}"] = _try(partial(_float8, device))
        findings[f"low-rank and sparse layers on {device}"] = _try(partial(_low_rank_and_sparse, device))
        findings[f"norms into codes on {device}"] = _try(partial(_codes, device))
        findings[f"int8 attention on {device}"] = _try(partial(_attention, device))
    findings |= _engines()
    for device in devices:
        findings |= _times(device)
    return findings


def _times(device: str) -> dict[str, str]:
    """What layers of a few forms take there, packed and in floats."""
    place = "" if device == "cpu" else f" on {device}"
    try:
        times = layer_times(TYPICAL, torch.device(device))
    except Exception as error:
        return {f"times of layers{place}": _failed(error)}
    return {
        f"{form.words()}{place}": f"{times[form].packed_ms:.3g} ms, {times[form].floats_ms:.3g} in floats"
        f"{': expanded at load' if loses(times[form]) else ''}"
        for form in TYPICAL
    }


def _products() -> str:
    """Which of two exact forms computes them on the CPU."""
    reason = why_no_byte_products()
    return "in bytes" if reason is None else f"in float32, exact by chunks of columns ({reason})"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _try(check: Callable[[], None]) -> str:
    try:
        check()
    except ImportError as error:
        return f"not installed: {error.name}"
    except Exception as error:
        return _failed(error)
    return "works"


def _failed(error: Exception) -> str:
    return f"fails: {type(error).__name__}: {str(error).splitlines()[0]}"


def _quantized(bits: int, device: str) -> None:
    weight, (scale, zero) = _weight(bits, device), (torch.ones(1, device=device), torch.ones(1, device=device).int())
    scales = (torch.ones(SIZE, device=device), scale)
    for point in (None, zero):
        _expect(quantized_linear(_tokens(device), weight, *scales, point, None, bits, 8))
        _expect(quantized_conv2d(_pixels(device), weight, *scales, point, None, *POINTWISE, bits, 8))


def _weight_only(bits: int, device: str) -> None:
    weight, scale = _weight(bits, device), torch.ones(SIZE, 2, device=device)
    _expect(weight_only_linear(_tokens(device), weight, scale, None, bits, SIZE // 2))
    _expect(weight_only_conv2d(_pixels(device), weight, scale, None, *POINTWISE, bits, SIZE // 2))


def _float8(device: str) -> None:
    weight = torch.ones(SIZE, SIZE, device=device).to(torch.float8_e4m3fn)
    scales = (torch.ones(SIZE, device=device), torch.ones(1, device=device))
    _expect(fp8_linear(_tokens(device), weight, *scales, None))
    _expect(fp8_conv2d(_pixels(device), weight, *scales, None, *POINTWISE))


def _low_rank_and_sparse(device: str) -> None:
    x, scale = _tokens(device).half(), torch.ones(SIZE, 1, device=device)
    # The branch adds nothing: a low-rank change of zero.
    down, up = torch.ones(16, SIZE, device=device).half(), torch.zeros(SIZE, 16, device=device).half()
    _expect(lora_linear(x, _weight(4, device), scale, down, up, None, 1.0, 4, SIZE))
    blocks = pack_blocks(
        torch.ones(SIZE, SIZE, device=device).half(), torch.ones(2, 2, device=device).bool(), SIZE // 2
    )
    _expect(block_sparse_linear(x, *blocks, outputs=SIZE))
    _expect(2 * semi_structured_linear(x, *pack_semi_structured(torch.ones(SIZE, SIZE, device=device).half())))


def _codes(device: str) -> None:
    """Values of 1 and -1 have mean 0 and variance 1, so a norm leaves them; at a scale of 1 / 64 their codes are 64."""
    signs, scale = torch.ones(SIZE, device=device), torch.full((1,), 1 / SIZE, device=device)
    signs[::2] = -1
    norm = norm_modulate_quantize(signs.repeat(1, 32, 1), activation_scale=scale)[0]
    zeros = torch.zeros(SIZE, device=device)
    images = signs.view(1, SIZE, 1, 1).repeat(1, 1, 8, 8)
    group = group_norm_silu_quantize(images, zeros + 1, zeros, scale, groups=4, activation="none")
    for codes in (quantize_rows(_tokens(device), scale)[0], norm.abs(), group.abs()):
        _expect(codes)


def _attention(device: str) -> None:
    """Keys that are alike weigh alike, and the mean of values that are alike is any of them."""
    tokens = torch.ones(1, 2, 32, SIZE, device=device).half()
    _expect(int8_attention(tokens, tokens, SIZE * tokens))


def _tokens(device: str) -> Tensor:
    return torch.ones(32, SIZE, device=device)


def _pixels(device: str) -> Tensor:
    return torch.ones(1, SIZE, 8, 8, device=device)


def _weight(bits: int, device: str) -> Tensor:
    return pack_codes(torch.ones(SIZE, SIZE, dtype=torch.int8, device=device), bits)


def _expect(output: Tensor) -> None:
    """All inputs, weights and scales are 1, so each output counts the input channels; others are made to give the same."""
    if not bool((output == SIZE).all()):
        raise ArithmeticError(f"expected {SIZE}, got {output.flatten()[0].item()}")


def _engines() -> dict[str, str]:
    """Sums of worst-case codes in every kind of layer, compared with int64, in the engines of exports."""
    findings: dict[str, str] = {}
    for name, examined in ENGINES.items():
        outcome = _try(lambda examined=examined: findings.update(examined()))
        if outcome != "works":
            findings[f"{name} engine"] = outcome
    return findings
