"""Tensors whose dtype stays what it is, whatever the model around them is cast to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Self

import torch
from torch import Tensor, nn


class ExactTensors(nn.Module):
    """A module of which integers, scales and tables over steps are moved, and never cast."""

    def exact_tensors(self) -> Iterable[str]:
        """Their dotted names in this module; absent ones are passed over."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Torch's own, by which `to`, `half` and all like them change a module."""
        before = {name: self._held(name) for name in self.exact_tensors()}
        kept = {name: tensor.data for name, tensor in before.items() if tensor is not None}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            after = self._held(name)
            if after is not None and after.dtype != tensor.dtype:
                # Not `after`: what a narrower dtype has rounded away does not come back.
                self._put(name, tensor.to(after.device))
        return self

    def _held(self, name: str) -> Tensor | None:
        path, _dot, last = name.rpartition(".")
        held: Tensor | None = getattr(self.get_submodule(path), last, None)
        return held

    def _put(self, name: str, value: Tensor) -> None:
        path, _dot, last = name.rpartition(".")
        owner = self.get_submodule(path)
        if last in owner._parameters:
            owner.register_parameter(last, nn.Parameter(value, requires_grad=False))
        else:
            owner._buffers[last] = value


def cast_by(fn: Callable[[Tensor], Tensor], dtype: torch.dtype) -> torch.dtype:
    """What `fn`, as it is given to `_apply`, casts tensors of `dtype` to."""
    return fn(torch.empty(0, dtype=dtype)).dtype
