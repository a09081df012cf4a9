"""What packed layers are given while a pipeline makes an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from diffpress.export.runtime import LayerUse, layers_of


@contextmanager
def layer_uses(pipeline: Any) -> Iterator[dict[str, LayerUse]]:
    """What the packed layers of `pipeline`, named `COMPONENT.MODULE`, are given while the context lasts."""
    uses: dict[str, LayerUse] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            shape, known = tuple(arguments[0].shape), uses.get(name)
            if known is None:
                uses[name] = LayerUse(input=shape, calls=1)
            else:
                largest = max(known.input, shape, key=math.prod)
                uses[name] = LayerUse(input=largest, calls=known.calls + 1)

        return hook

    handles = [layer.register_forward_pre_hook(look(name)) for name, layer in layers_of(pipeline)]
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()
