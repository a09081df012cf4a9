"""What stands for an output that nobody looks at: tensors of its shape that take no memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def has_outline(output: Any) -> bool:
    """Whether it is made of nothing but tensors, None, and tuples of these."""
    if isinstance(output, tuple):
        return type(output) is tuple and all(map(has_outline, output))
    return output is None or isinstance(output, Tensor)


def outline(output: Any) -> Any:
    """Zeros like `output`, which holds on to none of its memory."""
    if isinstance(output, tuple):
        return tuple(map(outline, output))
    return None if output is None else output.new_zeros(()).expand(output.shape)
