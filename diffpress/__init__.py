"""One verified folder from any diffusers pipeline: smaller, faster, with the proof beside it."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from diffpress.export.load import register_quantizers

if TYPE_CHECKING:
    from diffpress.export.artifact import load

    from .compiling import compile
    from .flow import press
    from .recipe import Recipe

__all__ = ["Recipe", "__version__", "compile", "load", "press"]
__version__ = _version("diffpress")

register_quantizers()

_HOMES = {
    "Recipe": "diffpress.recipe",
    "compile": "diffpress.compiling",
    "load": "diffpress.export.artifact",
    "press": "diffpress.flow",
}


def __getattr__(name: str) -> Any:
    """Import torch and diffusers only when something that needs them is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'diffpress' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
