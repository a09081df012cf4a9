"""Register with diffusers and transformers when they are imported, so that importing diffpress imports neither, nor torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from .method import Method

LIBRARIES = ("diffusers", "transformers")
"""Both keep their tables of quantizers under the same names in their module `quantizers.auto`."""


def register_quantizers() -> None:
    """Register with each library now where it is loaded already, else as soon as it is."""
    awaited = {finder.library for finder in sys.meta_path if isinstance(finder, _Finder)}
    for library in LIBRARIES:
        if _tables(library) in sys.modules:
            _register(library)
        elif library not in awaited:
            sys.meta_path.insert(0, _Finder(library))


def _tables(library: str) -> str:
    return f"{library}.quantizers.auto"


def _register(library: str) -> None:
    """Enter stand-ins that import the real classes when an artifact is loaded: importing them here would be circular."""
    tables = sys.modules[_tables(library)]
    tables.AUTO_QUANTIZER_MAPPING[Method.DIFFPRESS] = partial(_quantizer, library)
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.DIFFPRESS] = _Config


def _quantizer(library: str, config: Any, **options: Any) -> Any:
    return import_module(f".{library}", __package__).EditsQuantizer(config, **options)


class _Config:
    @staticmethod
    def from_dict(data: dict[str, Any], **options: Any) -> Any:
        from .config import EditsConfig

        return EditsConfig.from_dict(data, **options)


class _Finder(MetaPathFinder):
    """Waits for the tables of one library."""

    def __init__(self, library: str) -> None:
        self.library = library

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _tables(self.library):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            sys.meta_path.remove(self)
            spec.loader = _Loader(spec.loader, self.library)
        return spec


class _Loader(Loader):
    def __init__(self, inner: Loader, library: str) -> None:
        self.inner, self.library = inner, library

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _register(self.library)
