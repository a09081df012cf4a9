"""What is made once from a weight and kept as long as it lives: its codes in the order in which a kernel reads them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")


class Kept(NamedTuple):
    """Something made from a weight, and from which state of it."""

    address: int
    version: int
    value: Any


_kept = WeakTensorKeyDictionary()


def kept_with(weight: Tensor, form: Hashable, make: Callable[[], Made]) -> Made:
    """What `make` makes of `weight` in some `form`: by the first call, and anew where the tensor has changed.

    Tensors of inference mode do not say whether they change: theirs is made by every call. So it is by calls that a CUDA
    graph lends its memory to, which is not to be held longer.
    """
    if weight.is_inference():
        return make()
    forms: dict[Hashable, Kept] = _kept.setdefault(weight, {})
    kept, state = forms.get(form), (weight.data_ptr(), weight._version)
    if kept is None or kept[:2] != state:
        if weight.is_cuda and memory_is_lent(weight.device):
            return make()
        kept = forms[form] = Kept(*state, make())
    value: Made = kept.value
    return value


def memory_is_lent(device: torch.device) -> bool:
    """Whether what is allocated on a GPU now may belong to a CUDA graph, as that of torch.compile's `reduce-overhead`."""
    if torch.cuda.is_current_stream_capturing():
        return True
    trees: Any = sys.modules.get("torch._inductor.cudagraph_trees")
    manager = None if trees is None else trees.get_manager(device.index, create_if_none_exists=False)
    return manager is not None and manager.path_state is not trees.ExecutionState.NONE


def all_kept_with(weight: Tensor) -> list[Any]:
    """What was made of `weight` so far."""
    return [kept.value for kept in _kept.get(weight, {}).values()]
