"""Weights in the order in which the C++ library multiplies them, kept as long as the tensor that they were read from."""

from __future__ import annotations

import weakref
from ctypes import CDLL

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..packing import unpack_codes

Source = tuple[int, int, CDLL, int, int, int]
"""What panels depend on: memory and version of the tensor, the library, and the weights' channels, taps and bits."""


class Panels:
    """Weights [O, C * taps], packed from codes, in memory of the library that is given back with this object."""

    def __init__(self, weight: Tensor, source: Source) -> None:
        *_, library, channels, taps, bits = source
        codes = unpack_codes(weight, channels * taps, bits).contiguous()
        if codes.shape[1] != channels * taps:
            raise ValueError(f"weight holds {codes.shape[1]} codes a row, its layer reads {channels * taps}")
        self.source = source
        self.address: int | None = library.diffpress_pack(codes.data_ptr(), len(codes), channels, taps)
        if self.address is None:
            raise MemoryError(f"weights {list(codes.shape)}")
        self.bytes: int = library.diffpress_bytes(self.address)
        weakref.finalize(self, library.diffpress_release, self.address)


_kept = WeakTensorKeyDictionary()


def panels_of(weight: Tensor, library: CDLL, channels: int, taps: int, bits: int) -> Panels:
    """The panels of `weight`, packed codes [O, ...]: made by the first call, and anew where the tensor has changed.

    Tensors of inference mode do not say whether they change: theirs are made by every call.
    """
    if weight.is_inference():
        return Panels(weight, (weight.data_ptr(), 0, library, channels, taps, bits))
    source = (weight.data_ptr(), weight._version, library, channels, taps, bits)
    kept: Panels | None = _kept.get(weight)
    if kept is None or kept.source != source:
        kept = _kept[weight] = Panels(weight, source)
    return kept


def panel_bytes(weight: Tensor) -> int:
    """Memory that the panels of `weight` take beside it: 0 before its first call."""
    kept: Panels | None = _kept.get(weight)
    return kept.bytes if kept else 0
