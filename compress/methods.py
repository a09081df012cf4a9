"""The table of methods: a new one is a new file, options in `options.py`, and a line here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from .options import Feedback, Inherit, Magnitude, Masks, Modulation, Obs, Ptq, Qalora

if TYPE_CHECKING:
    from .stage import Method

STAGES = ("prune", "quantize", "steps")
"""In the order in which they are run; recipes call them so."""


@dataclass(frozen=True)
class Entry:
    """What a recipe may name."""

    stage: str
    name: str
    options: type[Any]
    module: str
    """Imported when it is needed, so that a recipe is checked without torch."""


METHODS = (
    Entry("prune", "obs", Obs, "diffpress.compress.prune.obs"),
    Entry("prune", "masks", Masks, "diffpress.compress.prune.masks.method"),
    Entry("prune", "magnitude", Magnitude, "diffpress.compress.prune.magnitude"),
    Entry("prune", "modulation", Modulation, "diffpress.compress.prune.modulation.method"),
    Entry("quantize", "ptq", Ptq, "diffpress.compress.ptq"),
    Entry("quantize", "qalora", Qalora, "diffpress.compress.qalora.method"),
    Entry("steps", "inherit", Inherit, "diffpress.compress.steps.inherit"),
    Entry("steps", "feedback", Feedback, "diffpress.compress.steps.feedback.method"),
)


def method_of(options: Any) -> Method:
    """The method that takes these options."""
    (module,) = (entry.module for entry in METHODS if entry.options is type(options))
    return cast("Method", import_module(module))
