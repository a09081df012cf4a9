"""What tables over steps hold for one step, looked up for all layers when the first of them asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Entry(NamedTuple):
    """What a table holds for the step."""

    table: Tensor
    """Held, so that no other tensor gets its number."""
    version: int
    value: Tensor
    """[1]"""


class StepEntries:
    """The entries of tables [steps] at one step of one thread.

    Each table's own look-up takes a GPU a few launches, which cost more than a small layer.
    """

    def __init__(self, look_up: Callable[[Tensor], Tensor], expected: Iterable[Tensor] = ()) -> None:
        """`look_up` makes [tables] of [tables, steps]; `expected` are the tables that the step before asked for."""
        self._look_up, self._expected = look_up, tuple(expected)
        self._entries: dict[int, Entry] = {}
        self.asked: dict[int, Tensor] = {}
        """Tables that were asked for, by their number."""

    def of(self, table: Tensor) -> Tensor:
        """The entry [1] of `table` as it is now."""
        entry = self._entries.get(id(table))
        if entry is None or entry.version != table._version:
            self._add(table)
            entry = self._entries[id(table)]
        self.asked[id(table)] = table
        return entry.value

    def _add(self, table: Tensor) -> None:
        tables = [table, *(other for other in self._expected if other is not table and self._is_new(other, table))]
        values = self._look_up(torch.stack(tables)).split(1)
        for each, value in zip(tables, values, strict=True):
            self._entries[id(each)] = Entry(each, each._version, value)

    def _is_new(self, other: Tensor, table: Tensor) -> bool:
        """Whether it is still to be looked up, and can be together with `table`."""
        like = (table.device, table.dtype, table.shape)
        return id(other) not in self._entries and (other.device, other.dtype, other.shape) == like


def is_plain(table: Tensor) -> bool:
    """Whether nothing follows what is looked up in `table`, and it says when it changes."""
    # The compiler is asked for first: it would write down what else is asked.
    return (
        not torch.compiler.is_compiling()
        and type(table) is Tensor
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and not (table.is_meta or table.is_inference() or table.requires_grad)
    )
