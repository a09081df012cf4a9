"""What every engine must be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from numpy.typing import NDArray

Array = NDArray[Any]
Form = Literal["uint8 x uint8", "uint8 x int8", "int8 folded"]
"""How the two sides of a product of codes are written: in uint8 the code of 0 is 128, in int8 it is 0.

`uint8 x uint8` is exact on every processor. `uint8 x int8` is what exports before schema 2 hold: x86 without VNNI adds
pairs of its products in saturating int16. `int8 folded` has pairs of a quantizer and a dequantizer around float products,
the quantizer constant and what a step changes outside of it.
"""


REASONS: dict[Form, str] = {
    "uint8 x uint8": "exact on every processor: x86 without VNNI adds pairs of uint8 x int8 products in saturating int16",
    "int8 folded": "what TensorRT runs in integers: symmetric, with a constant quantizer",
    "uint8 x int8": "fastest where a processor adds such products in int32",
}
ZERO = 128
"""Code of 0 in uint8."""


class Kernels(NamedTuple):
    """What multiplied in one run of a graph."""

    integer: int
    """How many matrix products and convolutions ran in integers."""
    floating: int
    by_operator: dict[str, int]
    """Of these, what the engine made of them."""


class Session(Protocol):
    """One graph, ready to run."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Every output by its name."""


class Engine(Protocol):
    """A library that runs graphs."""

    name: str
    form: Form
    """What graphs for it are written in."""

    @property
    def settings(self) -> dict[str, str]:
        """Those that decide what runs in integers."""

    def version(self) -> str:
        """Of the library. Raises UserError where it is not installed."""

    def open(self, graph: Path, threads: int = 0) -> Session:
        """A session of one file; 0 threads leaves the number to the engine. Raises ArtifactError where it refuses it."""

    def kernels(self, graph: Path, inputs: Mapping[str, Array], threads: int = 0) -> Kernels:
        """What multiplies in a run of a graph, as the engine itself says."""
