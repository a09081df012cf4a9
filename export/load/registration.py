"""Register with diffusers when diffusers is imported, so that importing diffpress itself imports neither it nor torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from .method import METHOD

TARGET = "diffusers.quantizers.auto"


def register_with_diffusers() -> None:
    """Register now where diffusers is loaded already, else as soon as it is."""
    if TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    """Enter stand-ins that import the real classes when an artifact is loaded: importing them here would be circular."""
    auto = sys.modules[TARGET]
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = _quantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _Config


def _quantizer(config: Any, **options: Any) -> Any:
    from .quantizer import EditsQuantizer

    return EditsQuantizer(config, **options)


class _Config:
    @staticmethod
    def from_dict(data: dict[str, Any], **options: Any) -> Any:
        from .quantizer import EditsConfig

        return EditsConfig.from_dict(data, **options)


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TARGET:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            sys.meta_path.remove(self)
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _register()
