"""What a method lays over the teacher's own modules, and takes off again: one copy of the weights serves both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

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

_BENEATH: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""Per module with wraps around it, what its instance had before each of them, the innermost first."""


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
            stack.enter_context(_wrapped(model.get_submodule(name), wrap))
        yield


@contextmanager
def _wrapped(module: nn.Module, wrap: Wrap) -> Iterator[None]:
    beneath = _BENEATH.setdefault(module, [])
    beneath.append(own_forward(module))
    try:
        set_forward(module, wrap(module.forward))
        yield
    finally:
        set_forward(module, beneath.pop())
        if not beneath:
            del _BENEATH[module]


@contextmanager
def teacher(model: nn.Module) -> Iterator[None]:
    """The original answers while the context lasts: every overlay of `model` is off."""
    with ExitStack() as stack:
        for module in model.modules():
            if module in _BENEATH:
                stack.callback(partial(set_forward, module, own_forward(module)))
                set_forward(module, _BENEATH[module][0])
        yield


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


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No weight of `model` needs a gradient while the context lasts."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
