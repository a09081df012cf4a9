"""What works on this machine: every kernel is run once, not guessed."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from diffpress.kernels import (
    fp8_conv2d,
    fp8_linear,
    pack_codes,
    quantized_conv2d,
    quantized_linear,
    weight_only_conv2d,
    weight_only_linear,
)

PACKAGES = ("diffpress", "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")
SIZE = 64
"""Input and output channels of the layers that are tried."""
POINTWISE = ((1, 1), (1, 1), (0, 0), (1, 1))
"""Kernel size, stride, padding and dilation of a convolution that is a linear layer at every position."""


def examine() -> dict[str, str]:
    """A finding a line: versions, and for every backend and kernel `works` or `fails: why`."""
    findings = {"machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"}
    findings |= {name: _version(name) for name in PACKAGES}
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for bits in (8, 4, 3, 2):
            findings[f"quantized layers W{bits}A8 on {device}"] = _try(partial(_quantized, bits, device))
            findings[f"weight-only layers W{bits} on {device}"] = _try(partial(_weight_only, bits, device))
        findings[f"float8 layers on {device}"] = _try(partial(_float8, device))
    findings["onnxruntime engine"] = _try(_onnxruntime)
    return findings


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
        return f"fails: {type(error).__name__}: {str(error).splitlines()[0]}"
    return "works"


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


def _tokens(device: str) -> Tensor:
    return torch.ones(32, SIZE, device=device)


def _pixels(device: str) -> Tensor:
    return torch.ones(1, SIZE, 8, 8, device=device)


def _weight(bits: int, device: str) -> Tensor:
    return pack_codes(torch.ones(SIZE, SIZE, dtype=torch.int8, device=device), bits)


def _expect(output: Tensor) -> None:
    """All inputs, weights and scales are 1, so each output counts the input channels."""
    if not bool((output == SIZE).all()):
        raise ArithmeticError(f"expected {SIZE}, got {output.flatten()[0].item()}")


def _onnxruntime() -> None:
    import onnxruntime

    if "CPUExecutionProvider" not in onnxruntime.get_available_providers():
        raise RuntimeError("no CPU execution provider")
