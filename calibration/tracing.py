"""What becomes of tensors with a gradient: which functions of torch take them, where, and what loses it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

TORCH = str(Path(torch.__file__).parent)
OUTSIDE = (TORCH, *(str(Path(__file__).with_name(f"{name}.py")) for name in ("tracing", "probe", "gradients")))
"""Whose code is not what is looked for."""
TO_PYTHON = ("numpy", "tolist", "item", "__array__", "__float__", "__int__")
"""Methods that take numbers out of torch."""


class Place(NamedTuple):
    """Where a function of torch was called."""

    function: Callable[..., Any]
    name: str
    line: str

    @classmethod
    def now(cls, function: Callable[..., Any]) -> Place:
        """In the innermost code that is neither torch's nor ours."""
        frame = sys._getframe(1)
        while frame.f_back and frame.f_code.co_filename.startswith(OUTSIDE):
            frame = frame.f_back
        return cls(function, frame.f_code.co_qualname, f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}")

    def __str__(self) -> str:
        """For a message."""
        return f"{self.name} ({self.line}: {resolve_name(self.function) or self.function.__name__})"


class Operation(NamedTuple):
    """A function of torch that was called with something that has a gradient, after so many answers of the denoiser."""

    answers: int
    place: Place
    inputs: list[Tensor]
    outputs: list[Tensor]
    cut: bool
    """Whether what came out had none, and was given one anew."""


class Trace(TorchFunctionMode):
    """Follows everything that a pipeline does with what has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.answers, self._follows = 0, True

    def cuts(self) -> list[Operation]:
        """Those after which something had no gradient any more."""
        return [own for own in self.operations if own.cut and own.outputs[0].requires_grad]

    def release(self) -> None:
        """What was given a gradient anew may be somebody's: it is as it was."""
        for cut in self.cuts():
            for y in cut.outputs:
                if y.is_leaf:
                    y.requires_grad_(False)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is followed while the context lasts."""
        self._follows = False
        try:
            yield
        finally:
            self._follows = True

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[Any],
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        options = options or {}
        tracked = [x for x in tree_leaves((arguments, options)) if isinstance(x, Tensor) and x.requires_grad]
        result = function(*arguments, **options)
        # What comes before the first answer cannot come between an answer and the latents.
        if tracked and self.answers and self._follows and not _reads_no_value(function):
            self._follow(function, tracked, result)
        return result

    def _follow(self, function: Callable[..., Any], tracked: list[Tensor], result: Any) -> None:
        tensors = [y for y in tree_leaves(result) if isinstance(y, Tensor)]
        floats = [y for y in tensors if y.is_floating_point()]
        whole = any(not y.is_floating_point() and y.dtype != torch.bool for y in tensors)
        if floats or whole or function.__name__ in TO_PYTHON:
            cut = bool(floats) and not any(y.requires_grad for y in floats)
            if cut and not any(y.is_inference() for y in floats):
                floats = [y.requires_grad_() for y in floats]
            self.operations.append(Operation(self.answers, Place.now(function), tracked, floats, cut))


def _reads_no_value(function: Callable[..., Any]) -> bool:
    """Of tensors that have the shape of another one only."""
    return function.__name__.endswith("_like") or function.__name__.startswith("new_")


class Barriers:
    """Modules that were given something with a gradient and gave back nothing with one, in the order in which they ended."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """While the context lasts."""
        with ExitStack() as stack:
            for name, module in model.named_modules():
                stack.callback(module.register_forward_hook(self._hook(name), with_kwargs=True).remove)
            yield

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, options: Any, output: Any) -> None:
            if _has_gradient((arguments, options)) and not _has_gradient(output):
                self.found[name] = type(module).__name__

        return hook

    def innermost(self) -> str | None:
        """The one because of which the last one is a barrier; others may only have read a shape."""
        innermost: str | None = None
        for name in reversed(self.found):
            if innermost and not name.startswith(f"{innermost}."):
                break
            innermost = name
        return innermost and f"{innermost} ({self.found[innermost]})"


def _has_gradient(values: Any) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(values))


def place_of(traceback: TracebackType | None) -> str:
    """The innermost code that is neither torch's nor ours."""
    words = "its code"
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if not code.co_filename.startswith(OUTSIDE):
            words = f"{code.co_qualname} ({Path(code.co_filename).name}, line {traceback.tb_lineno})"
        traceback = traceback.tb_next
    return words
