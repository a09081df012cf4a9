"""Which parts of a pipeline are its denoisers: those that are told the time step, and so are called at every step."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from torch import nn

from .load.registration import LIBRARIES
from .runtime import time_argument


def is_denoiser(part: Any) -> bool:
    """Whether a module, or a class of them, is a model that is told the time step."""
    kind = part if isinstance(part, type) else type(part)
    if not issubclass(kind, nn.Module):
        return False
    # What stands in for a model may have the signature of that one alone.
    forwards = {kind.forward, part.forward}
    return any(time_argument(inspect.signature(forward).parameters) is not None for forward in forwards)


def parts_of(pipeline: Any) -> dict[str, Any]:
    """The parts of a pipeline by name; of an object that is no pipeline of diffusers, its attributes."""
    parts: dict[str, Any] = getattr(pipeline, "components", None) or getattr(pipeline, "__dict__", {})
    return parts


def no_denoiser(name: str, parts: Iterable[str]) -> str:
    """What to say of a pipeline that has none."""
    return (
        f"{name} has no part that is told the time step, so that nothing in it is called step by step; its parts are "
        f"{', '.join(parts)}."
    )


def library_with(library: str, name: str) -> str:
    """Where the class `name` of `library` is: classes that pipelines of diffusers once kept for themselves are in diffusers."""
    if library in LIBRARIES or not hasattr(import_module("diffusers.pipelines"), library):
        return library
    return "diffusers" if hasattr(import_module("diffusers"), name) else library


def _is_built_by_settings(kind: Any) -> bool:
    """Whether a class is a denoiser that can be made anew: what holds several, as of ControlNets, has no settings."""
    return is_denoiser(kind) and (hasattr(kind, "from_config") or hasattr(kind, "config_class"))


def denoisers_in(components: Mapping[str, str], libraries: Mapping[str, str]) -> list[str]:
    """Of components, by name to class and to library, those that are denoisers and that edits can be carried by."""
    return [
        component
        for component, name in components.items()
        if (library := libraries[component]) in LIBRARIES
        and _is_built_by_settings(getattr(import_module(library), name, None))
    ]
