"""What updates the sample, and what it is given at every step."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from diffpress.export.denoisers import parts_of


def schedulers_of(pipeline: Any) -> list[Any]:
    """What updates the sample by what it is given, mostly one."""
    return [part for part in parts_of(pipeline).values() if hasattr(part, "step") and hasattr(part, "set_timesteps")]


@contextmanager
def watch_guided(pipeline: Any, receive: Callable[[Tensor], None]) -> Iterator[None]:
    """Hand what a scheduler is given at every step to `receive` while the pipeline runs once."""
    schedulers = schedulers_of(pipeline)
    for scheduler in schedulers:
        scheduler.step = _WatchedStep(scheduler, receive)
    try:
        yield
    finally:
        for scheduler in schedulers:
            del scheduler.step


class _WatchedStep:
    """The step of a scheduler; a copy that a pipeline makes of the scheduler has its own, which nobody watches."""

    def __init__(self, scheduler: Any, receive: Callable[[Tensor], None]) -> None:
        self.scheduler, self.receive, self.step = scheduler, receive, scheduler.step
        # Pipelines ask by the signature what a step takes.
        functools.update_wrapper(self, scheduler.step)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.receive((arguments[0] if arguments else options["model_output"]).detach())
        return self.step(*arguments, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self.scheduler)]
        return types.MethodType(type(copied).step, copied)
