"""The C++ libraries that the installation builds, one for each tier of processors."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path

TIERS = ("amx", "avx512vnni", "avxvnni", "avx2", "i8mm", "neondot", "neon")
"""What a processor multiplies bytes with, the fastest first, of x86 and of aarch64. `tiers_*.cpp` say which there are."""
ONEDNN = "amx"
"""A tier without a library: with its tiles oneDNN, which references call, multiplies several times faster than C++ would."""
CHOICE = "DIFFPRESS_CPU"
"""Environment variable: a lower tier than the processor's, to test it and to time it."""
ADDRESS, NUMBER = ctypes.c_void_p, ctypes.c_int64
FUNCTIONS = {
    "diffpress_pack": ([ADDRESS, *3 * [NUMBER]], ADDRESS),
    "diffpress_release": ([ADDRESS], None),
    "diffpress_bytes": ([ADDRESS], NUMBER),
    "diffpress_layer": (9 * [ADDRESS], ctypes.c_bool),
    "diffpress_attention": ([ADDRESS], None),
}
"""What each function takes and gives."""


class TierError(ValueError):
    """The user chose a tier that is not here."""


def shared_library() -> ctypes.CDLL | None:
    """The library of this processor's tier, or None where there is a reason not to use one."""
    return _library(os.environ.get(CHOICE))


def tier() -> str | None:
    """The tier that computes: the fastest that the processor has and that was built, or the one that the user chose.

    Raises TierError where the user chose one that is not here.
    """
    return _tier(os.environ.get(CHOICE))


@cache
def _library(chosen: str | None) -> ctypes.CDLL | None:
    name = _tier(chosen)
    return _loaded(name) if name in built_tiers() else None


@cache
def _tier(chosen: str | None) -> str | None:
    here = [name for name in processor_tiers() if name == ONEDNN or name in built_tiers()]
    if chosen and chosen not in here:
        known = ", ".join(here) or "none"
        raise TierError(
            f"{CHOICE}={chosen}: this processor and installation have {known}. Unset it, or name one of them."
        )
    return chosen or next(iter(here), None)


def why_no_library() -> str | None:
    """The reason why references answer in its place, or None."""
    if not built_tiers():
        return "no C++ library was built"
    if tier() is None:
        return f"the processor has none of {', '.join(TIERS)}"
    return "with AMX oneDNN is faster, which references call" if tier() == ONEDNN else None


@cache
def processor_tiers() -> tuple[str, ...]:
    """Tiers that the processor has, the fastest first."""
    file = _find("diffpress_cpu.so")
    found = ctypes.CDLL(str(file)).diffpress_tiers() if file else 0
    return tuple(name for place, name in enumerate(TIERS) if found >> place & 1)


@cache
def built_tiers() -> tuple[str, ...]:
    """Tiers that the installation has a library for: a compiler may be too old for some."""
    return tuple(name for name in TIERS if _find(f"diffpress_cpu_{name}.so"))


@cache
def _loaded(name: str) -> ctypes.CDLL:
    return open_library(_find(f"diffpress_cpu_{name}.so"))


def open_library(file: Path | None) -> ctypes.CDLL:
    """A tier's library, with the types of its functions."""
    library = ctypes.CDLL(str(file))
    for function, (arguments, result) in FUNCTIONS.items():
        getattr(library, function).argtypes, getattr(library, function).restype = arguments, result
    return library


def _find(name: str) -> Path | None:
    """A file of this package: an editable install keeps what was built apart from the sources."""
    folders = map(Path, sys.modules[__name__.rpartition(".")[0]].__path__)
    return next((folder / name for folder in folders if (folder / name).exists()), None)
