"""What tables over steps hold for one step, looked up for all layers when the first of them asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Known(NamedTuple):
    """A table that was asked for."""

    table: Tensor
    """Held, so that no other tensor gets its number."""
    version: int
    copy: Tensor
    """What it held then: whoever offloads a layer may have put anything in the place of its tensors meanwhile."""


class StepEntries:
    """The entries of tables [steps] at one step of one thread.

    Each table's own look-up takes a GPU a few launches, which cost more than a small layer.
    """

    def __init__(self, look_up: Callable[[Tensor], Tensor], before: StepEntries | None = None) -> None:
        """`look_up` makes [tables] of [tables, steps]; what was asked for at the step `before` is looked up at once."""
        self._look_up = look_up
        self._expected = {} if before is None else before.known
        self._entries: dict[int, Tensor] = {}
        self.known: dict[int, Known] = {}
        """Tables that were asked for, by their number."""

    def of(self, table: Tensor) -> Tensor:
        """The entry [1] of `table` as it is now."""
        known = self.known.get(id(table))
        if known is None or known.version != table._version:
            self.known[id(table)] = self._added(table)
        return self._entries[id(table)]

    def _added(self, table: Tensor) -> Known:
        known = self._expected.get(id(table))
        if known is None or known.version != table._version or known.copy.device != table.device:
            known = Known(table, table._version, table.clone())
            self._entries[id(table)] = self._look_up(known.copy[None])
        elif id(table) not in self._entries:
            self._look_up_all(known.copy)
        return known

    def _look_up_all(self, first: Tensor) -> None:
        """Those expected that can be stacked with `first`, itself among them."""
        form = (first.device, first.dtype, first.shape)
        alike = [own for own in self._expected.values() if (own.copy.device, own.copy.dtype, own.copy.shape) == form]
        values = self._look_up(torch.stack([own.copy for own in alike])).split(1)
        self._entries.update(zip((id(own.table) for own in alike), values, strict=True))


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
