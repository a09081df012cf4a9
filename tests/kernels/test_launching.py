"""What a kernel is launched with: the first time by Triton, then as it was compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.language import constexpr

from diffpress.kernels import launching
from diffpress.kernels.launching import launch_kernel


class Kernel:
    """Stands for a function of Triton, and writes down who launched it with what."""

    __name__ = "kernel"
    arg_names = ("x", "y", "N", "scale", "A", "B")

    @staticmethod
    def fn(x: Any, y: Any, N: Any, scale: Any, A: constexpr, B: constexpr) -> None:  # noqa: N803
        """What is compiled."""

    def __init__(self) -> None:
        self.compiled: list[dict[str, Any]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def first(*arguments: Any, **options: Any) -> Any:
            self.compiled.append(options)
            self.launched.append((*grid, *[1] * (3 - len(grid)), *arguments, options["A"], options["B"]))
            return self

        def again(*arguments: Any) -> None:
            self.launched.append((*grid[:3], *arguments))

        return first if len(grid) < 3 else again


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launching, "JITFunction", Kernel)
    monkeypatch.setattr(launching, "_compiled", {})
    return Kernel()


def launch(kernel: Kernel, x: torch.Tensor, N: int = 32, scale: float = 0.5, grid: Any = (7,), **options: Any) -> None:  # noqa: N803
    launch_kernel(kernel, grid, x, x, N, scale, **{"A": 3, "B": True, **options})


def test_what_was_compiled_gets_the_same_arguments(kernel: Kernel) -> None:
    x = torch.zeros(4)
    for grid, scale in (((7,), 0.5), ((8, 2), 0.25)):
        launch(kernel, x, scale=scale, grid=grid)
    assert len(kernel.compiled) == 1
    assert kernel.launched == [(7, 1, 1, x, x, 32, 0.5, 3, True), (8, 2, 1, x, x, 32, 0.25, 3, True)]


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(4, dtype=torch.int8)},
        {"x": torch.zeros(5)[1:]},
        {"N": 1},
        {"N": 33},
        {"N": 2**31},
        {"A": 4},
        {"warps": 8},
        {"stages": 4},
    ],
    ids=["dtype", "alignment", "one", "odd", "long", "constant", "warps", "stages"],
)
def test_what_triton_compiles_anew_is_compiled_anew(kernel: Kernel, other: dict[str, Any]) -> None:
    launch(kernel, torch.zeros(4))
    launch(kernel, **{"x": torch.zeros(4), **other})
    assert len(kernel.compiled) == 2


def test_constants_come_by_name_and_in_the_order_of_the_kernel(kernel: Kernel) -> None:
    x = torch.zeros(4)
    with pytest.raises(TypeError, match=r"kernel ends with the constants \['A', 'B'\], not \['B', 'A'\]"):
        launch_kernel(kernel, (7,), x, x, 32, 0.5, B=True, A=3)
    # By its place a constant would be taken for a number that may change.
    with pytest.raises(TypeError, match=r"not \['B'\]"):
        launch_kernel(kernel, (7,), x, x, 32, 0.5, 3, B=True)


def test_amd_compiles_for_the_length_of_what_is_pointed_to(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "IS_HIP", True)
    launch(kernel, torch.zeros(4))
    monkeypatch.setattr(launching, "LONGEST_BUFFER", 8)
    launch(kernel, torch.zeros(4))
    assert len(kernel.compiled) == 2
