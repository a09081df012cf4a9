"""How every Triton kernel is launched."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton import JITFunction

LONGEST_BUFFER = 2**31 - 1
"""Bytes that AMD's GPUs reach with offsets of 32 bits."""
IS_HIP = torch.version.hip is not None
_compiled: dict[Hashable, Any] = {}
"""Kernels, by what they are compiled for."""


def launch_kernel(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 3, **constants: Any
) -> None:
    """Run `kernel[grid]` on the GPU of its first argument; `constants` are all that it has, at its end, in its order.

    Triton finds out anew with every launch what a kernel was compiled for, which takes a processor longer than a GPU takes for
    a small layer. What it looks at is the key here.
    """
    device = arguments[0].device
    with _on(device):
        key = (kernel, device, warps, stages, *map(_form, arguments), *constants.values())
        compiled = _compiled.get(key)
        if compiled is not None:
            compiled[(*grid, 1, 1)](*arguments, *constants.values())
            return
        _check(kernel, len(arguments), list(constants))
        compiled = kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages)
        if isinstance(kernel, JITFunction):
            _compiled[key] = compiled


def given(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A contiguous `tensor`, or where there is none a pointer that the kernel will not follow."""
    return stand_in if tensor is None else tensor.contiguous()


def _check(kernel: Any, arguments: int, constants: list[str]) -> None:
    """Raises TypeError where the key would not hold all constants, or they would be handed on in another order."""
    wanted = [name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)]
    if constants != wanted or constants != list(kernel.arg_names[arguments:]):
        raise TypeError(f"{kernel.__name__} ends with the constants {wanted}, not {constants}")


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU, wherever its arguments lie."""
    here = device.type != "cuda" or device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(device)


def _form(argument: Any) -> Hashable:
    """What Triton compiles an argument for: its type, whether it is aligned, 1, or a multiple of 16; for AMD its length too."""
    if isinstance(argument, Tensor):
        aligned = argument.data_ptr() % 16 == 0
        return argument.dtype, aligned, not IS_HIP or argument.untyped_storage().size() <= LONGEST_BUFFER
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    return float
