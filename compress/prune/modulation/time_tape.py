"""What each layer's input is made of in one call of a denoiser, and how that which the time step alone makes is made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from diffpress.calibration.conditions import Condition
from diffpress.calibration.sampling import Sampling, denoiser_of, sample
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.runtime import Forward, time_argument, time_of

from ...overlay import overlaid

FORMS_ONLY = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full")
)
"""What reads how a tensor looks and not what is in it."""
NOTHING: frozenset[str] = frozenset()

Inputs = Mapping[str, Sequence[Tensor]]
"""What each layer is fed in one call of the denoiser, once for each time that the layer runs."""


class Step(NamedTuple):
    """One operation that reads the time step, and nothing else that differs between calls."""

    operation: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    outputs: list[Tensor]

    def read(self) -> list[Tensor]:
        return _tensors((self.arguments, self.options))


class TimeTape(TorchDispatchMode):
    """Follows the inputs of one call through every operation, and remembers those that read the time step alone.

    Tensors are told apart by the memory that they share, so that views and what is written in place are followed as well.
    What leaves tensors on its way, as numbers of Python, is not.
    """

    def __init__(self, inputs: Sequence[tuple[str, Tensor]], time: str) -> None:
        """`inputs`, by name, each with memory of its own; `time` names the time step."""
        super().__init__()
        (self.time,) = (tensor for name, tensor in inputs if name == time)
        self.steps, self.alone = list[Step](), frozenset({time})
        self._sources = {_memory(tensor): frozenset({name}) for name, tensor in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        sources = self.sources(_tensors((args, options)))
        output = func(*args, **options)
        made = _tensors(output)
        if getattr(func, "overloadpacket", None) in FORMS_ONLY:
            sources = NOTHING
        self._sources |= {_memory(tensor): sources for tensor in made}
        if sources == self.alone:
            self.steps.append(Step(func, args, options, made))
        return output

    def sources(self, tensors: Sequence[Tensor]) -> frozenset[str]:
        """The names of the inputs that `tensors` are made of."""
        return NOTHING.union(*(self._sources.get(_memory(tensor), NOTHING) for tensor in tensors))

    def reads(self, inputs: Sequence[Tensor], tensor: Tensor) -> bool:
        """Whether the `inputs` of a layer are made with `tensor`, such as the weight of an earlier one."""
        return _memory(tensor) in {_memory(own) for step in self._needed(inputs) for own in step.read()}

    def replay(self, inputs: Inputs) -> Callable[[float], dict[str, Tensor]]:
        """A function: the different rows [N, K] that each layer is fed at another time step, in float32.

        16-bit floats are computed in 32 bits. Such `inputs` must be made of the time step alone.
        """
        steps = [_Replayed(step) for step in self._needed([x for own in inputs.values() for x in own])]

        def at(time: float) -> dict[str, Tensor]:
            made = {id(self.time): torch.full_like(self.time, time, dtype=torch.float32)}
            for step in steps:
                step(made)
            # What was written into a tensor that time had no part in before is in that tensor itself.
            return {name: distinct_rows([made.get(id(x), x) for x in own]) for name, own in inputs.items()}

        return at

    def _needed(self, inputs: Sequence[Tensor]) -> list[Step]:
        needed, chosen = {_memory(tensor) for tensor in inputs}, list[Step]()
        for step in reversed(self.steps):
            if needed.intersection(map(_memory, step.outputs)):
                chosen.append(step)
                needed |= set(map(_memory, step.read()))
        return chosen[::-1]


class _Replayed:
    """A step that can be made again with what other steps have made anew."""

    def __init__(self, step: Step) -> None:
        leaves, self._form = tree_flatten((step.arguments, step.options))
        self._leaves = [(id(leaf), _wide(leaf)) for leaf in leaves]
        self._operation, self._outputs = step.operation, [id(tensor) for tensor in step.outputs]

    def __call__(self, made: dict[int, Tensor]) -> None:
        """`made` holds, by the identity of what the tape saw, what is in its place now; the outputs are put there."""
        arguments, options = tree_unflatten([made.get(key, leaf) for key, leaf in self._leaves], self._form)
        made.update(zip(self._outputs, _tensors(self._operation(*arguments, **options)), strict=True))


def distinct_rows(inputs: Sequence[Tensor]) -> Tensor:
    """The rows [N, K] of what a layer is fed in one call, in float32; of neighbours that only rounding tells apart, one."""
    rows = torch.cat([x.flatten(0, -2) for x in inputs])
    # Half the digits: products of other shapes, or at other places of a batch, round otherwise.
    digits, rows = torch.finfo(rows.dtype).eps ** 0.5, rows.float()
    moved = (rows[1:] - rows[:-1]).norm(dim=1) > digits * rows[1:].norm(dim=1)
    return rows[torch.cat([moved.new_ones(1), moved])]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> StorageWeakRef:
    # A weak reference keeps the address from being given to another.
    return StorageWeakRef(tensor.untyped_storage())


def _wide(leaf: Any) -> Any:
    half = (torch.float16, torch.bfloat16)
    if isinstance(leaf, Tensor):
        return leaf.float() if leaf.dtype in half else leaf
    return torch.float32 if leaf in half else leaf


class Traced(NamedTuple):
    """What is known of a denoiser from one run of its pipeline."""

    tape: TimeTape
    """Of the first call."""
    fed: dict[str, list[Tensor]]
    """In the first call, those layers that see one row an image."""
    told: list[float]
    """The time step of every call."""


def trace(pipeline: Any, condition: Condition, sampling: Sampling) -> Traced:
    """Sample once. Raises UnsupportedModelError where the denoiser is not told the time step."""
    denoiser = denoiser_of(pipeline)
    tapes, told, fed = list[TimeTape](), list[float](), dict[str, list[Tensor]]()

    def around(beneath: Forward) -> Forward:
        signature = inspect.signature(beneath)

        def forward(*arguments: Any, **options: Any) -> Any:
            bound = signature.bind(*arguments, **options)
            time = time_argument(bound.arguments)
            if time is None:
                raise UnsupportedModelError(f"prune: {type(denoiser).__name__} is not told the time step.")
            bound.arguments |= {time: torch.as_tensor(bound.arguments[time])}
            told.append(float(time_of(bound.arguments[time])))
            if tapes:
                return beneath(*bound.args, **bound.kwargs)
            bound.arguments = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, bound.arguments)
            tapes.append(TimeTape(list(_named(bound.arguments)), time))
            with watched_layers(denoiser, fed), tapes[0]:
                return beneath(*bound.args, **bound.kwargs)

        return forward

    with overlaid(denoiser, {"": around}):
        sample(pipeline, [condition], sampling)
    return Traced(tapes[0], fed, told)


def _named(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor among the arguments; of those in a mapping the inner name."""
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from _named(value)
        else:
            yield from ((name, tensor) for tensor in _tensors(value))


@contextmanager
def watched_layers(denoiser: nn.Module, fed: dict[str, list[Tensor]]) -> Iterator[None]:
    """Put into `fed` what every Linear is fed while the context lasts, where that is one row an image each time."""
    many: set[str] = set()

    def watcher(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(_layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            if x.ndim > 2 and x.shape[1:-1].numel() > 1:
                many.add(name)
            if name not in many:
                fed.setdefault(name, []).append(x)

        return look

    layers = [(name, layer) for name, layer in denoiser.named_modules() if isinstance(layer, nn.Linear)]
    handles = [layer.register_forward_pre_hook(watcher(name)) for name, layer in layers]
    try:
        yield
    finally:
        for name in many & fed.keys():
            del fed[name]
        for handle in handles:
            handle.remove()
