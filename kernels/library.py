"""Which implementation of an operation runs: torch's reference, or the Triton kernel where there is a GPU for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor
from torch.library import custom_op

CHOICE = "DIFFPRESS_KERNELS"
"""Environment variable; `reference` makes every operation run its reference, which is the truth the others are held to."""


def only_reference() -> bool:
    """Whether the user asked for the truth, however slow."""
    return os.environ.get(CHOICE) == "reference"


def define_op(
    package: str, reference: Callable[..., Any], fake: Callable[..., Any], on_gpu: str | None = "triton_kernel"
) -> None:
    """Register `diffpress::NAME` for the folder `package` (its `__name__`), one node for torch.compile and export.

    `reference` answers everywhere but on CUDA and ROCm, where `launch` of the folder's module `on_gpu` does, if it has one;
    `fake` gives an output of the right form without computing it.
    """
    op = custom_op(f"diffpress::{package.rpartition('.')[2]}", reference, mutates_args=())
    op.register_fake(fake)
    if on_gpu is None:
        return

    def launch(*arguments: Any) -> Any:
        # Triton is imported by the first call that needs it: it takes seconds, and may be missing on a CPU.
        chosen = reference if only_reference() else import_module(f".{on_gpu}", package).launch
        return chosen(*arguments)

    op.register_kernel("cuda")(launch)


def like_rows(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    """The form of what a linear layer with `weight` [N, ...] makes of `x` [..., K]: [..., N]."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
