"""Weights that stand for others: transformers ties them, diffusers does not."""

from __future__ import annotations

from typing import Any

from torch import nn


class Shared(nn.Module):
    """Stands where another module holds the weight: without tensors of its own, so that they are stored once."""

    def __init__(self, holder: nn.Module) -> None:
        super().__init__()
        # In a tuple, where torch does not take it for a child.
        self._holder = (holder,)

    def forward(self, *arguments: Any) -> Any:
        return self._holder[0](*arguments)


def ties(model: nn.Module) -> dict[str, str]:
    """Names of tensors to the names of those that stand for them."""
    return getattr(model, "all_tied_weights_keys", {})


def share_(model: nn.Module, module: str, holder: nn.Module) -> None:
    """Let what is tied to the weight of `module` share `holder`, which takes that module's place."""
    for name in [alias for alias, source in ties(model).items() if source == f"{module}.weight"]:
        model.set_submodule(name.removesuffix(".weight"), Shared(holder))
        # Transformers looks the names up, and would miss the tensor.
        del ties(model)[name]
