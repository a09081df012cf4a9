"""A part of the denoiser, seen from inside one call of the whole, which goes no further than that part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .conditions import Condition
from .sampling import Sampling, answer, denoisers_of, sample
from .schedulers import schedulers_of


class Arguments(NamedTuple):
    """What a module is called with."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


class _Reached(BaseException):
    """Ends a call from inside; no error, so that nobody between catches it as one."""


def arguments_of(denoiser: nn.Module, name: str, inputs: Mapping[str, Tensor], recorded: torch.dtype) -> Arguments:
    """What the module `name` is first called with while `denoiser` answers to `inputs` (see `sampling.answer`).

    Nothing behind it is called, nor is the module itself.
    """
    module = denoiser.get_submodule(name)
    seen: list[Arguments] = []

    def look(_module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(Arguments(positional, named))
        raise _Reached

    _run_until([module.register_forward_pre_hook(look, with_kwargs=True)], lambda: answer(denoiser, inputs, recorded))
    return seen[0]


def output_of(denoiser: nn.Module, name: str, inputs: Mapping[str, Tensor], recorded: torch.dtype) -> Any:
    """What the module `name` answers when it is first called; nothing behind it is called."""
    module = denoiser.get_submodule(name)
    seen: list[Any] = []

    def look(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
        seen.append(output)
        raise _Reached

    _run_until([module.register_forward_hook(look)], lambda: answer(denoiser, inputs, recorded))
    return seen[0]


def scheduler_in_use(pipeline: Any, condition: Condition, sampling: Sampling) -> Any:
    """A copy of the pipeline's scheduler, the first of several, as it begins a run: time steps, sigmas and shift are set, no
    step is taken. None where it has none.
    """

    def stop(*_: Any) -> None:
        raise _Reached

    handles = [denoiser.register_forward_pre_hook(stop) for denoiser in denoisers_of(pipeline).values()]
    _run_until(handles, lambda: sample(pipeline, [condition], sampling))
    return copy.deepcopy(next(iter(schedulers_of(pipeline)), None))


def _run_until(handles: Sequence[RemovableHandle], call: Callable[[], object]) -> None:
    try:
        call()
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def call_order(
    denoiser: nn.Module, names: Iterable[str], inputs: Mapping[str, Tensor], recorded: torch.dtype
) -> list[str]:
    """The modules `names` in the order in which they are first called; those that never are, are left out."""
    seen: dict[str, None] = {}

    def look(name: str) -> Callable[..., None]:
        return lambda *_: seen.setdefault(name)

    handles = [denoiser.get_submodule(name).register_forward_pre_hook(look(name)) for name in names]
    try:
        answer(denoiser, inputs, recorded)
    finally:
        for handle in handles:
            handle.remove()
    return list(seen)
