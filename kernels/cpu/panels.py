"""Weights in the order in which the C++ library multiplies them, kept as long as the tensor that they were read from."""

from __future__ import annotations

import weakref
from ctypes import CDLL
from functools import partial

from torch import Tensor

from ..kept import all_kept_with, kept_with
from ..packing import unpack_codes


class Panels:
    """Weights [O, C * taps], packed from codes, in memory of the library that is given back with this object."""

    def __init__(self, weight: Tensor, library: CDLL, channels: int, taps: int, bits: int) -> None:
        codes = unpack_codes(weight, channels * taps, bits).contiguous()
        if codes.shape[1] != channels * taps:
            raise ValueError(f"weight holds {codes.shape[1]} codes a row, its layer reads {channels * taps}")
        self.address: int | None = library.diffpress_pack(codes.data_ptr(), len(codes), channels, taps)
        if self.address is None:
            raise MemoryError(f"weights {list(codes.shape)}")
        self.bytes: int = library.diffpress_bytes(self.address)
        weakref.finalize(self, library.diffpress_release, self.address)


def panels_of(weight: Tensor, library: CDLL, channels: int, taps: int, bits: int) -> Panels:
    """The panels of `weight`, packed codes [O, ...], which are kept with it."""
    form = (library, channels, taps, bits)
    return kept_with(weight, form, partial(Panels, weight, *form))


def panel_bytes(weight: Tensor) -> int:
    """Memory that the panels of `weight` take beside it: 0 before its first call."""
    return sum(panels.bytes for panels in all_kept_with(weight) if isinstance(panels, Panels))
