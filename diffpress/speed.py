"""Whether a compressed pipeline is faster where it was timed, in words, and what becomes of its layers there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffpress.export.runtime import Expansion

from .report.formatting import byte_size

if TYPE_CHECKING:
    from .measuring import Measured

FASTER, AS_FAST = 0.95, 1.05
"""Largest ratios of the times of an image that are called so."""


@dataclass(frozen=True)
class Speed:
    """What was timed of two pipelines, on which machine."""

    ratio: float
    """Of the times of an image, as `diffpress.load` leaves both."""
    smaller: bool
    """Whether the candidate's denoiser is."""
    machine: str
    expansion: Expansion
    packed: Mapping[str, Any]
    """`latency_ms` and `peak_memory_bytes` where all layers stay packed; empty where none was expanded."""
    beside: str = "original"
    """What the other is called."""

    def words(self) -> str:
        """`faster`, `as fast`, `smaller, not faster` or, of what is not smaller either, `slower`."""
        if self.ratio <= AS_FAST:
            return "faster" if self.ratio <= FASTER else "as fast"
        return "smaller, not faster" if self.smaller else "slower"

    def told_before_saving(self) -> bool:
        """Whether a user has to know of it before there is an artifact."""
        return self.ratio > AS_FAST

    def headline(self) -> str:
        """Such as `As fast: 1.01 of the original's time on AMD EPYC, 2 threads, C++`."""
        return f"{self.words().capitalize()}: {self.ratio:.2f} of the {self.beside}'s time on {self.machine}"

    def detail(self) -> str:
        """What is expanded there, and what it is like without; empty where nothing is."""
        if not self.packed:
            return ""
        ratio, peak = self.packed["latency_ms"]["ratio"], self.packed["peak_memory_bytes"]["candidate"]
        return (
            f'{expansion_words(self.expansion)}. With prefer="memory", as with plain diffusers, all stay packed: '
            f"{ratio:.2f} of the {self.beside}'s time, {byte_size(peak)} at most"
        )

    def data(self) -> dict[str, Any]:
        """The same for `--json`."""
        return {"words": self.words(), "ratio": self.ratio, "machine": self.machine, "prefer_memory": self.packed} | (
            expansion_data(self.expansion)
        )


def speed_of(measured: Measured, metrics: Mapping[str, Any], beside: str = "original") -> Speed:
    """Of what was measured; `metrics` say the sizes."""
    stored = metrics["size_bytes"]
    return Speed(
        measured.cost["latency_ms"]["ratio"],
        stored["candidate"] < stored["reference"],
        measured.machine,
        measured.expansion,
        measured.packed,
        beside,
    )


def expansion_words(expansion: Expansion) -> str:
    """What becomes of the packed layers of a pipeline that is loaded here."""
    if expansion.reason:
        return f"All {expansion.count} packed layers stay so: {expansion.reason}"
    if not expansion.expanded:
        return f"All {expansion.count} packed layers stay so"
    return (
        f"{len(expansion.expanded)} of {expansion.count} packed layers are slower than floats there and are expanded at "
        f"load, which takes {byte_size(expansion.size_bytes)}"
    )


def expansion_data(expansion: Expansion) -> dict[str, Any]:
    """The same for `--json`."""
    return {
        "packed_layers": expansion.count - len(expansion.expanded),
        "expanded_layers": len(expansion.expanded),
        "expanded_bytes": expansion.size_bytes,
    }
