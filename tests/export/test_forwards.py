"""What is known of a forward."""

from __future__ import annotations

import gc
import weakref
from functools import wraps
from typing import Any

import pytest
from torch import nn

from diffpress.export.runtime.forwards import parameter_names


class Layer(nn.Module):
    def forward(self, sample: Any, timestep: Any = None, *, scale: float = 1.0) -> Any:
        return sample


class Around:
    """As what is laid around a forward."""

    def __init__(self, forward: Any) -> None:
        self.__wrapped__ = forward

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.__wrapped__(*arguments, **options)


class Decorated(Layer):
    @wraps(Layer.forward)
    def forward(self, *arguments: Any, **options: Any) -> Any:
        return super().forward(*arguments, **options)


@pytest.mark.parametrize("kind", [Layer, Decorated])
def test_names_are_those_of_what_answers_whatever_lies_around_it(kind: type[nn.Module]) -> None:
    layer = kind()
    assert parameter_names(layer.forward) == ("sample", "timestep", "scale")
    layer.forward = Around(layer.forward)  # type: ignore[method-assign]
    assert parameter_names(layer.forward) == ("sample", "timestep", "scale")


def test_a_signature_is_read_once_for_all_instances_and_keeps_none_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer()
    layer.forward = Around(layer.forward)  # type: ignore[method-assign]
    parameter_names(layer.forward)
    monkeypatch.setattr("inspect.signature", lambda _: pytest.fail("read again"))
    assert parameter_names(Layer().forward) == parameter_names(layer.forward)
    alive = weakref.ref(layer)
    del layer
    gc.collect()
    assert alive() is None
