"""Calls that go past torch's dispatcher, and those that must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffpress.kernels import quantized_linear
from diffpress.kernels.library import Operation


def arguments(columns: int = 16) -> tuple[Any, ...]:
    weight = torch.arange(-32, 32, dtype=torch.int8).view(4, 16)
    return torch.ones(2, columns), weight, torch.ones(4), torch.ones(1), None, torch.zeros(4), 8, 8


class Seen(TorchDispatchMode):
    """Names of what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def operation() -> tuple[Operation, list[str]]:
    """One of its own, and who answered."""
    answered: list[str] = []

    def check(x: Tensor, *_: Any) -> None:
        answered.append("check")
        if x.shape[-1] != 16:
            raise ValueError("x must have 16 columns")

    found = Operation("quantized_linear", check, {"cpu": lambda *_: answered.append("kernel")})
    found._op = lambda *_: answered.append("dispatcher")
    return found, answered


def test_the_second_call_of_a_form_is_not_checked(operation: tuple[Operation, list[str]]) -> None:
    call, answered = operation
    for _ in range(3):
        call(*arguments())
    assert answered == ["check", "dispatcher", "kernel", "kernel"]
    for _ in range(2):
        with pytest.raises(ValueError, match="16 columns"):
            call(*arguments(15))


@pytest.mark.parametrize("place", [0, 1, 5])
def test_tensors_of_another_kind_are_a_form_of_their_own(operation: tuple[Operation, list[str]], place: int) -> None:
    call, answered = operation
    call(*arguments())
    given = list(arguments())
    for other in (given[place].to("meta"), given[place].to(torch.float64), torch.ones(3, 16)):
        answered.clear()
        call(*given[:place], other, *given[place + 1 :])
        assert answered == ["check", "dispatcher"]


def test_what_follows_a_tensor_sees_the_operation(operation: tuple[Operation, list[str]]) -> None:
    given = arguments()
    quantized_linear(*given)
    with Seen() as mode:
        quantized_linear(*given)
    assert mode.names == ["diffpress.quantized_linear.default"]
    call, answered = operation
    call(*arguments())
    answered.clear()
    x, *rest = arguments()
    call(x.requires_grad_(), *rest)
    torch.func.vmap(lambda row: (call(row, *rest), row)[1])(torch.ones(3, 2, 16))
    assert answered == ["check", "dispatcher"] * 2
