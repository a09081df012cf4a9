"""A module's forward, and what may be laid around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

Forward = Callable[..., Any]
"""What answers a call of a module."""

Wrap = Callable[[Forward], Forward]
"""From the forward of a module to one that stands for it. It may change what goes in and what the module computes with."""

NOTHING = object()
"""Stands where an instance has no forward of its own, and the one of its class answers."""

_NAMES: WeakKeyDictionary[Callable[..., Any], tuple[str, ...]] = WeakKeyDictionary()
"""By the function that answers in the end: a signature takes longer than the forward of a small layer."""


def parameter_names(forward: Forward) -> tuple[str, ...]:
    """What the forward of an instance calls its arguments, in their order."""
    # A compiler that follows this must not tie its graph to one object of a bound method: it reads the signature once anyway.
    if torch.compiler.is_compiling():
        return tuple(inspect.signature(forward).parameters)
    function = inspect.unwrap(forward)
    function = getattr(function, "__func__", function)
    if function not in _NAMES:
        _NAMES[function] = tuple(inspect.signature(forward).parameters)
    return _NAMES[function]


def own_forward(module: nn.Module) -> Forward | Any:
    """What somebody has set for this instance, or NOTHING."""
    return module.__dict__.get("forward", NOTHING)


def set_forward(module: nn.Module, forward: Forward | Any) -> None:
    """Have `forward` answer for this instance; NOTHING leaves it to the class."""
    # An attribute of the instance stands before the method of its class.
    if forward is NOTHING:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward
