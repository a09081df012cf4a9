"""What rows of one model share, made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from diffpress.compress.prune.moments import Moments, moments_of
from diffpress.compress.stage import Subject

Made = TypeVar("Made")
_MADE: WeakKeyDictionary[nn.Module, dict[str, object]] = WeakKeyDictionary()


def once(model: nn.Module, name: str, make: Callable[[], Made]) -> Made:
    """What was made for this model under that name before, or is made now."""
    known = _MADE.setdefault(model, {})
    if name not in known:
        known[name] = make()
    return known[name]  # type: ignore[return-value]


def moments_once(subject: Subject, readers: Sequence[str]) -> dict[str, Moments]:
    """Of what all layers that read units are fed, over all that was recorded."""
    model, trajectories = subject.model, subject.trajectories
    return once(
        model, "moments", lambda: dict(moments_of(model, readers, trajectories, trajectories.shards, subject.seed))
    )
