"""Which implementation of an operation runs: torch's reference, or a kernel of the device where there is one for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, infer_schema, register_fake

CHOICE = "DIFFPRESS_KERNELS"
"""Environment variable; `reference` makes every operation run its reference, which is the truth the others are held to."""

# `custom_op` would do the same, but each call through it takes three times as long: 8 microseconds a layer.
_LIBRARY = Library("diffpress", "DEF")


def only_reference() -> bool:
    """Whether the user asked for the truth, however slow."""
    return os.environ.get(CHOICE) == "reference"


def define_op(
    package: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    on_gpu: str | None = "triton_kernel",
    on_cpu: str | None = None,
) -> None:
    """Register `diffpress::NAME` for the folder `package` (its `__name__`), one node for torch.compile and export.

    `launch` of the folder's module `on_gpu` answers on CUDA and ROCm, that of `on_cpu` on the CPU, and `reference` where
    there is none; `fake` gives an output of the right form without computing it.
    """
    name = package.rpartition(".")[2]
    _LIBRARY.define(name + infer_schema(reference, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    register_fake(f"diffpress::{name}", fake, lib=_LIBRARY)
    for device, module in (("CUDA", on_gpu), ("CPU", on_cpu)):
        if module is not None:
            _LIBRARY.impl(name, _first_choice(package, module, reference), device)


def _first_choice(package: str, module: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """`launch` of the module, unless only the reference is wanted."""

    def launch(*arguments: Any) -> Any:
        return (reference if only_reference() else kernel())(*arguments)

    @cache
    def kernel() -> Callable[..., Any]:
        # Imported by the first call that needs it: Triton takes seconds, and may be missing on a CPU.
        return import_module(f".{module}", package).launch

    return launch


def like_rows(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    """The form of what a linear layer with `weight` [N, ...] makes of `x` [..., K]: [..., N]."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
