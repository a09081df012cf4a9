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
    """What was made from one state of a weight, by its form."""

    state: tuple[int, int]
    """Address and version."""
    forms: dict[Hashable, Any]


_kept = WeakTensorKeyDictionary()


def kept_with(weight: Tensor, form: Hashable, make: Callable[[], Made]) -> Made:
    """What `make` makes of `weight` in some `form`: by the first call, and anew where the tensor has changed.

    Tensors of inference mode do not say whether they change: theirs is made by every call. So it is by calls that a CUDA
    graph lends its memory to, which is not to be held longer; a graph goes on with what was kept when it was recorded. What
    is kept must not hold the weight.
    """
    if weight.is_inference():
        return make()
    kept, state = _kept.get(weight), (weight.data_ptr(), weight._version)
    if kept is None or kept.state != state:
        kept = Kept(state, {})
    if form not in kept.forms:
        if weight.is_cuda and memory_is_lent(weight.device):
            return make()
        kept.forms[form] = make()
        if weight.is_cuda:
            # Other streams will read it.
            torch.cuda.current_stream(weight.device).synchronize()
        _kept[weight] = kept
    made: Made = kept.forms[form]
    return made


def memory_is_lent(device: torch.device) -> bool:
    """Whether what is allocated on a GPU now may belong to a CUDA graph, as that of torch.compile's `reduce-overhead`."""
    if torch.cuda.is_current_stream_capturing():
        return True
    trees: Any = sys.modules.get("torch._inductor.cudagraph_trees")
    manager = None if trees is None else trees.get_manager(device.index, create_if_none_exists=False)
    return manager is not None and manager.path_state is not trees.ExecutionState.NONE


def all_kept_with(weight: Tensor) -> list[Any]:
    """What is kept with `weight` so far."""
    kept = _kept.get(weight)
    return [] if kept is None else list(kept.forms.values())
