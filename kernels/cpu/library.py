"""The C++ library that the installation builds."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

NAME = "diffpress_cpu.so"
ARGUMENTS = {"diffpress_layer": 9, "diffpress_attention": 1}
"""How many addresses each function takes."""


def shared_library() -> ctypes.CDLL | None:
    """The library, or None where there is a reason not to use it."""
    return None if why_no_library() else _loaded()


@cache
def why_no_library() -> str | None:
    """The reason why references answer in its place, or None.

    One is AMX: with its tiles oneDNN, which references call, multiplies several times faster.
    """
    library = _loaded()
    if library is None:
        return "no C++ library was built"
    return None if library.diffpress_supported() else "the processor lacks AVX512-VNNI, or has AMX"


@cache
def _loaded() -> ctypes.CDLL | None:
    built = [file for folder in _folders() if (file := folder / NAME).exists()]
    if not built:
        return None
    library = ctypes.CDLL(str(built[0]))
    for name, count in ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = count * [ctypes.c_void_p], None
    return library


def _folders() -> list[Path]:
    """Where this package lies: an editable install keeps what was built apart from the sources."""
    return [Path(folder) for folder in sys.modules[__name__.rpartition(".")[0]].__path__]
