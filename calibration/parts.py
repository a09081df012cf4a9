"""What does not fit into memory at once, in parts that do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def in_parts(items: Iterable[Item], size_bytes: Callable[[Item], int], budget: int) -> Iterator[list[Item]]:
    """Neighbours together that take at most `budget` bytes, one at least."""
    part: list[Item] = []
    taken = 0
    for item in items:
        size = size_bytes(item)
        if part and taken + size > budget:
            yield part
            part, taken = [], 0
        part.append(item)
        taken += size
    if part:
        yield part
