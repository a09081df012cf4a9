"""Which implementation of an operation runs: torch's reference, or a kernel of the device where there is one for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, infer_schema, register_fake
from torch.nn import Parameter

CHOICE = "DIFFPRESS_KERNELS"
"""Environment variable; `reference` makes every operation run its reference, which is the truth the others are held to."""

# `custom_op` would do the same, but each call through it takes three times as long: 8 microseconds a layer.
_LIBRARY = Library("diffpress", "DEF")


def only_reference() -> bool:
    """Whether the user asked for the truth, however slow."""
    return os.environ.get(CHOICE) == "reference"


Answering = Mapping[str, Callable[..., Any]]
"""What computes an operation, by the type of the device."""


class Operation:
    """One operation. On plain tensors it goes past torch's dispatcher and the check, which take as long as a small layer."""

    def __init__(self, name: str, check: Callable[..., None] | None, answering: Answering) -> None:
        self._op, self._check, self._answering = getattr(torch.ops.diffpress, name), check, answering
        self._known: set[tuple[Any, ...]] = set()

    def __call__(self, *arguments: Any) -> Any:
        """Compute it; the arguments are those of its reference. Raises what `check` raises where they do not fit."""
        first = arguments[0]
        if not _is_plain(first):
            return self._checked(self._op, *arguments)
        forms = tuple(map(_form, arguments))
        if forms in self._known:
            return self._answering["cuda" if first.is_cuda else "cpu"](*arguments)
        result = self._checked(self._op, *arguments)
        if all(form is not ELSEWHERE for form in forms) and len(self._known) < MOST_KNOWN:
            self._known.add(forms)
        return result

    def _checked(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        if self._check is not None:
            self._check(*arguments)
        return compute(*arguments)


ELSEWHERE = object()
"""Form of a tensor that is not a plain one of the CPU or of a GPU."""
MOST_KNOWN = 4096
"""Forms of arguments that an operation remembers to have been right."""


def _is_plain(x: Any) -> bool:
    """Whether nothing follows what is done with `x`: no compiler, export, mode, transform or gradient."""
    # The compiler is asked for first: it would write down what else is asked.
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and (x.is_cpu or x.is_cuda)
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def _form(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        plain = type(argument) in (Tensor, Parameter) and (argument.is_cpu or argument.is_cuda)
        # The number of a GPU; -1 is the CPU.
        return (argument.dtype, argument.shape, argument.get_device()) if plain else ELSEWHERE
    return tuple(argument) if isinstance(argument, (list, tuple)) else argument


def define_op(
    package: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    on_gpu: str | None = "triton_kernel",
    on_cpu: str | None = None,
    check: Callable[..., None] | None = None,
) -> Operation:
    """Register `diffpress::NAME` for the folder `package` (its `__name__`), one node for torch.compile and export.

    `launch` of the folder's module `on_gpu` answers on CUDA and ROCm, that of `on_cpu` on the CPU, and `reference` where
    there is none; `fake` gives an output of the right form without computing it; `check` raises where arguments do not
    fit.
    """
    name = package.rpartition(".")[2]
    _LIBRARY.define(name + infer_schema(reference, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    register_fake(f"diffpress::{name}", fake, lib=_LIBRARY)
    kernels = {device: module for device, module in (("CUDA", on_gpu), ("CPU", on_cpu)) if module is not None}
    answering = {device: _first_choice(package, module, reference) for device, module in kernels.items()}
    for device, launch in answering.items():
        _LIBRARY.impl(name, launch, device)
    return Operation(name, check, {device: answering.get(device.upper(), reference) for device in ("cpu", "cuda")})


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
