"""What works on this machine: every kernel is run once, not guessed."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from diffpress.kernels import quantized_conv2d, quantized_linear

PACKAGES = ("diffpress", "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")


def examine() -> dict[str, str]:
    """A finding a line: versions, and for every backend and kernel `works` or `fails: why`."""
    findings = {"machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"}
    findings |= {name: _version(name) for name in PACKAGES}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for name, kernel in (("quantized_linear", _linear), ("quantized_conv2d", _conv2d)):
            for bits in (8, 4):
                findings[f"{name} W{bits}A8 on {device}"] = _try(lambda k=kernel, b=bits, d=device: k(b, d))  # type: ignore[misc]
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


def _weight(rows: int, columns: int, bits: int, device: str) -> torch.Tensor:
    stored = columns if bits == 8 else (columns + 1) // 2
    return torch.ones(rows, stored, dtype=torch.int8 if bits == 8 else torch.uint8, device=device)


def _linear(bits: int, device: str) -> None:
    x, scale = torch.ones(32, 64, device=device), torch.ones(1, device=device)
    _expect(
        quantized_linear(x, _weight(64, 64, bits, device), torch.ones(64, device=device), scale, None, bits, 8), bits
    )


def _conv2d(bits: int, device: str) -> None:
    x, scale = torch.ones(1, 64, 8, 8, device=device), torch.ones(1, device=device)
    weight, weight_scale = _weight(64, 64, bits, device), torch.ones(64, device=device)
    output = quantized_conv2d(x, weight, weight_scale, scale, None, (1, 1), (1, 1), (0, 0), (1, 1), bits, 8)
    _expect(output, bits)


def _expect(output: torch.Tensor, bits: int) -> None:
    """All inputs are 1, so each output counts the weights that are: all of 64, or every other where a byte holds two."""
    expected = 64 if bits == 8 else 32
    if not bool((output == expected).all()):
        raise ArithmeticError(f"expected {expected}, got {output.flatten()[0].item()}")


def _onnxruntime() -> None:
    import onnxruntime

    if "CPUExecutionProvider" not in onnxruntime.get_available_providers():
        raise RuntimeError("no CPU execution provider")
