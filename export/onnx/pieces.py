"""The calls in which a model computes on codes: where its graph is taken apart to be checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..runtime import AttentionOverride, Int8Attention, PackedLayer, own_forward, set_forward, why_not_int8


@dataclass(frozen=True)
class Piece:
    """One call of a packed layer, or of attention on integers."""

    module: str
    """Its path."""
    name: str
    """The path, and which of the module's calls this is where there are more than one."""
    owner: PackedLayer | Int8Attention
    compute: Callable[..., Tensor]
    """What torch answers."""


def module_of(piece: str) -> str:
    """The module of a piece, by the piece's name."""
    return piece.partition("#")[0]


Answer = Callable[[Piece, tuple[Tensor, ...]], Tensor]


@contextmanager
def answering(module: nn.Module, answer: Answer) -> Iterator[None]:
    """Have `answer` asked instead at every call of a packed layer and of attention on integers, in the order of calls."""
    taken: list[Callable[[], None]] = []
    calls: dict[str, int] = {}

    def piece(name: str, owner: Any, compute: Callable[..., Tensor]) -> Piece:
        calls[name] = calls.get(name, 0) + 1
        return Piece(name, name if calls[name] == 1 else f"{name}#{calls[name]}", owner, compute)

    try:
        for name, part in module.named_modules():
            if isinstance(part, PackedLayer):
                taken.append(_take_layer(part, name, piece, answer))
            elif isinstance(part.forward, AttentionOverride) and isinstance(part.forward.attend, Int8Attention):
                taken.append(_take_attention(part.forward, part.forward.attend, name, piece, answer))
        yield
    finally:
        for give_back in taken:
            give_back()


def _take_layer(layer: PackedLayer, name: str, piece: Callable[..., Piece], answer: Answer) -> Callable[[], None]:
    compute, before = layer.forward, own_forward(layer)

    def forward(x: Tensor) -> Tensor:
        return answer(piece(name, layer, compute), (x,))

    set_forward(layer, forward)
    # A step plan may lie around it.
    return partial(set_forward, layer, before)


def _take_attention(
    override: AttentionOverride, own: Int8Attention, name: str, piece: Callable[..., Piece], answer: Answer
) -> Callable[[], None]:
    def attend(*arguments: Any, **options: Any) -> Tensor:
        # What it computes in floats is no piece.
        if why_not_int8(*arguments, **options) is not None:
            return own(*arguments, **options)
        return answer(piece(name, own, own), arguments[:3])

    def give_back() -> None:
        override.attend = own

    override.attend = attend
    return give_back
