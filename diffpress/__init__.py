"""One verified folder from any diffusers pipeline: smaller, faster, with the proof beside it."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from diffpress import compress
from diffpress.export.load import register_quantizers

if TYPE_CHECKING:
    from diffpress.calibration.checkpointing import checkpoint_steps
    from diffpress.export.artifact import load

    from .compiling import compile, record_graphs
    from .recipe import Recipe

__all__ = ["Recipe", "__version__", "checkpoint_steps", "compile", "compress", "load", "record_graphs"]
__version__ = _version("diffpress")

register_quantizers()

_HOMES = {
    "Recipe": "diffpress.recipe",
    "checkpoint_steps": "diffpress.calibration.checkpointing",
    "compile": "diffpress.compiling",
    "load": "diffpress.export.artifact",
    "record_graphs": "diffpress.compiling",
}


def __getattr__(name: str) -> Any:
    """Import torch and diffusers only when something that needs them is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'diffpress' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


class _Compress(ModuleType):
    """The folder `compress` has the name of what this package does: as a function it is `flow.compress_by_name`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return import_module("diffpress.flow").compress_by_name(*arguments, **options)


compress.__class__ = _Compress
