"""Register with diffusers, transformers and peft once they are imported: importing diffpress imports none, nor torch."""

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
TUNERS = "peft.tuners.lora"
"""Where peft enters its own tuner into its table."""


def register_quantizers() -> None:
    """Register with each library now where it is loaded already, else as soon as it is."""
    awaited = {finder.module for finder in sys.meta_path if isinstance(finder, _Finder)}
    for module in (*map(_tables, LIBRARIES), TUNERS):
        if module in sys.modules:
            _register(module)
        elif module not in awaited:
            sys.meta_path.insert(0, _Finder(module))


def _tables(library: str) -> str:
    return f"{library}.quantizers.auto"


def _register(module: str) -> None:
    """Enter stand-ins that import the real classes when an artifact is loaded: importing them here would be circular."""
    if module == TUNERS:
        _register_tuner()
        return
    library, tables = module.partition(".")[0], sys.modules[module]
    tables.AUTO_QUANTIZER_MAPPING[Method.DIFFPRESS] = partial(_quantizer, library)
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.DIFFPRESS] = _Config


def _register_tuner() -> None:
    """A tuner that knows our layers, in place of the one that it extends."""
    tuner = import_module(".adapters", __package__).EditedLoraModel
    types = import_module("peft.utils.peft_types")
    import_module("peft.mapping").PEFT_TYPE_TO_TUNER_MAPPING[types.PeftType.LORA] = tuner


def _quantizer(library: str, config: Any, **options: Any) -> Any:
    return import_module(f".{library}", __package__).EditsQuantizer(config, **options)


class _Config:
    @staticmethod
    def from_dict(data: dict[str, Any], **options: Any) -> Any:
        from .config import EditsConfig

        return EditsConfig.from_dict(data, **options)


class _Finder(MetaPathFinder):
    """Waits for one module."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.module:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            sys.meta_path.remove(self)
            spec.loader = _Loader(spec.loader, self.module)
        return spec


class _Loader(Loader):
    def __init__(self, inner: Loader, module: str) -> None:
        self.inner, self.module = inner, module

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _register(self.module)
