"""What a method lays over the teacher's own modules, and takes off again: one copy of the weights serves both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

from diffpress.calibration.gradients import requiring_gradients
from diffpress.export.edits import Replacement
from diffpress.export.runtime import (
    Attention,
    AttentionOverride,
    StepClock,
    Wrap,
    attach_clock_,
    own_forward,
    set_forward,
)

from .options import LARGE


class _Laid(NamedTuple):
    """An attribute of a module that an overlay has set."""

    owner: nn.Module
    name: str
    before: Any


_LAID: WeakKeyDictionary[nn.Module, list[_Laid]] = WeakKeyDictionary()
"""Per model what overlays have set in it, in the order in which they came."""


@contextmanager
def overlaid(model: nn.Module, wraps: Mapping[str, Wrap], clock: StepClock | None = None) -> Iterator[None]:
    """Lay `wraps` around the forwards of the named modules while the context lasts, `clock` following the model's calls.

    Overlays nest: an inner one is laid around what the outer one answers. Whoever set a forward before, accelerate for
    example, finds it again afterwards. Raises AttributeError where `model` has no module of a name.
    """
    with ExitStack() as stack:
        if clock is not None:
            stack.callback(attach_clock_(model, clock).remove)
        for name, wrap in wraps.items():
            module = model.get_submodule(name)
            stack.enter_context(_laid(model, module, "forward", wrap(module.forward)))
        yield


@contextmanager
def replaced(model: nn.Module, replacements: Iterable[Replacement]) -> Iterator[None]:
    """Put other modules, and other attributes, in their places while the context lasts; overlays laid later find those."""
    with ExitStack() as stack:
        for replacement in replacements:
            stack.enter_context(_laid(model, *replacement))
        yield


@contextmanager
def _laid(model: nn.Module, owner: nn.Module, name: str, value: Any) -> Iterator[None]:
    laid = _LAID.setdefault(model, [])
    laid.append(_Laid(owner, name, _get(owner, name)))
    try:
        _set(owner, name, value)
        yield
    finally:
        last = laid.pop()
        _set(owner, name, last.before)
        if not laid:
            del _LAID[model]


@contextmanager
def teacher(model: nn.Module) -> Iterator[None]:
    """The original answers while the context lasts: every overlay of `model` is off."""
    laid = list(_LAID.get(model, ()))
    now = []
    for owner, name, before in reversed(laid):
        now.append((owner, name, _get(owner, name)))
        _set(owner, name, before)
    try:
        yield
    finally:
        for owner, name, value in reversed(now):
            _set(owner, name, value)


def _get(owner: nn.Module, name: str) -> Any:
    return own_forward(owner) if name == "forward" else getattr(owner, name)


def _set(owner: nn.Module, name: str, value: Any) -> None:
    if name == "forward":
        set_forward(owner, value)
    else:
        setattr(owner, name, value)


def overriding_attention(attention: Mapping[str, Attention]) -> dict[str, Wrap]:
    """Wraps that leave the named modules as they are, but have their attention answered by `attention`."""

    def wrap(answer: Attention) -> Wrap:
        return lambda forward: AttentionOverride(forward, answer)

    return {name: wrap(answer) for name, answer in attention.items()}


@contextmanager
def checkpointed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """While the context lasts `model` keeps the inputs of its blocks only, where that is `wanted` and it knows how to."""
    knows = getattr(model, "_supports_gradient_checkpointing", False)
    if not (wanted and knows) or model.is_gradient_checkpointing:
        yield
        return
    model.enable_gradient_checkpointing()  # type: ignore[operator]
    try:
        yield
    finally:
        model.disable_gradient_checkpointing()  # type: ignore[operator]


def is_large(model: nn.Module) -> bool:
    """Whether time is spent to save memory."""
    return sum(parameter.numel() for parameter in model.parameters()) >= LARGE


def frozen(model: nn.Module) -> AbstractContextManager[None]:
    """No weight of `model` needs a gradient while the context lasts."""
    return requiring_gradients(model.parameters(), False)
