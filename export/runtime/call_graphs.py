"""A denoiser's calls as CUDA graphs: recorded once for each form of arguments, then launched by one call of the processor.

Denoisers in integers launch more kernels than those in 16 bits, and each of them costs a processor as much as it costs a GPU.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from .clock import attached_clocks
from .forwards import Forward

MOST = 8
"""Graphs that are kept, those asked for last: each holds what its call computes."""
WARM_UPS = 2
"""Calls before the one that is recorded: they compile kernels, and make what is kept with weights."""


class CallGraph(NamedTuple):
    """One recorded call."""

    inputs: list[Tensor]
    """On the GPU; what a call is given is copied here."""
    output: Any
    replay: Callable[[], None]


class GraphedForward:
    """Answers for the forward of a denoiser by replaying graphs; by the forward itself where a call cannot be recorded."""

    def __init__(self, denoiser: nn.Module, forward: Forward) -> None:
        """`denoiser` lies on a GPU, and `forward` is what answered so far."""
        self._denoiser, self.forward = denoiser, forward
        # Who asks for the names of its arguments is to see those of the denoiser.
        functools.update_wrapper(self, forward)
        self._weight = next(denoiser.parameters())
        self._graphs: dict[Hashable, CallGraph] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy has other weights: it is not recorded.
        return _itself, (self.forward,)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """What `forward` answers; its tensors are the caller's."""
        leaves, tree = tree_flatten((arguments, options))
        if self._is_recordable(leaves):
            with self._lock:
                return self._replayed(leaves, tree)
        return self.forward(*arguments, **options)

    def _is_recordable(self, leaves: Sequence[Any]) -> bool:
        learns = torch.is_grad_enabled() and self._weight.requires_grad
        here = (self._weight.device, torch.device("cpu"))
        fits = all(leaf.device in here if isinstance(leaf, Tensor) else isinstance(leaf, Hashable) for leaf in leaves)
        return fits and not learns and not torch.compiler.is_compiling()

    def _replayed(self, leaves: Sequence[Any], tree: TreeSpec) -> Any:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = (str(tree), self._state(), *map(_form, leaves))
        # The last that was asked for stands at the end.
        graph = self._graphs.pop(key, None) or self._record(leaves, tree)
        self._graphs[key] = graph
        while len(self._graphs) > MOST:
            del self._graphs[next(iter(self._graphs))]
        for place, tensor in zip(graph.inputs, tensors, strict=True):
            place.copy_(tensor)
        graph.replay()
        return tree_map_only(Tensor, torch.clone, graph.output)

    def _state(self) -> Hashable:
        """What a graph depends on beside its arguments: where the weights lie, and what products are computed in."""
        device = self._weight.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return self._weight.data_ptr(), autocast

    def _record(self, leaves: Sequence[Any], tree: TreeSpec) -> CallGraph:
        # What inference mode makes could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            device = self._weight.device
            places = [leaf.detach().clone().to(device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            arguments, options = tree_unflatten(places, tree)

            def call() -> Any:
                # The hooks that ran before this call told the step, not to the graph.
                for clock in attached_clocks(self._denoiser):
                    clock.follow(self._denoiser, arguments, options)
                return self.forward(*arguments, **options)

            inputs = [place for place in places if isinstance(place, Tensor)]
            return CallGraph(inputs, *record(call, device))


def record(call: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
    """The output of `call` on a GPU, and what computes it anew into the same memory."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):
        output = call()
    return output, graph.replay


def _itself(forward: Forward) -> Forward:
    return forward


def _form(leaf: Any) -> Hashable:
    """What a recorded call is fixed to: the form of a tensor, and anything else itself."""
    return (leaf.dtype, leaf.shape, leaf.stride()) if isinstance(leaf, Tensor) else (type(leaf), leaf)
