"""What is laid around a denoiser and remembers the sampling runs it is called for: the ground that runtime parts stand on."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Self

from torch import nn

from .clock import StepClock
from .exact import ExactTensors
from .forwards import Wrap
from .runs import Runs


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.runs = Runs()
        self.frame: Any = None


class RuntimePart(ExactTensors):
    """A module beside those of a denoiser, whose `wraps` are laid around them; every thread has runs of its own."""

    def __init__(self, clock: StepClock) -> None:
        super().__init__()
        self.clock = clock
        self._thread = _ThreadState()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy has runs of its own.
        super().__setstate__(state)
        self._thread = _ThreadState()

    @property
    def runs(self) -> Runs:
        """Of this thread."""
        return self._thread.runs

    @property
    def frame(self) -> Any:
        """What the part knows of the call that this thread is in; None outside of calls."""
        return self._thread.frame

    @frame.setter
    def frame(self, value: Any) -> None:
        self._thread.frame = value

    @classmethod
    def around(cls, plan: Any, model: nn.Module, clock: StepClock) -> Self:
        """The part of `plan` for `model`, whose weights may not be there yet. Raises AttributeError where it does not fit."""
        raise NotImplementedError

    def wraps(self, model: nn.Module) -> Mapping[str, Wrap]:
        """What lies around the forwards of modules of `model`, by their names; the denoiser itself has none."""
        raise NotImplementedError
