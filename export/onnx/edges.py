"""Torch as an engine that chooses the other code wherever rounding decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffpress.kernels import quantize

from ..runtime import PackedLayer
from .pieces import Piece, answering
from .rounding import codes, layer_rounding, smoothed, token_scales


@contextmanager
def at_edges(module: nn.Module, rounding: Mapping[str, float]) -> Iterator[None]:
    """Move every value that lies within rounding, of its tensor's root mean square, of an edge between codes across it.

    `rounding` is how far an engine was off in what pieces are given; another may be off to the other side, by a layer more.

    What this does to the output is what one code of each quantiser, where engines may differ in it, can explain; the codes
    that move because of others are in it, as they are in an engine.
    """

    least = layer_rounding(module)

    def answer(piece: Piece, inputs: tuple[Tensor, ...]) -> Tensor:
        near = 2 * rounding.get(piece.module, 0.0) + least
        if not isinstance(piece.owner, PackedLayer):
            return piece.compute(*(_crossed(x, near, _token_codes(x)) for x in inputs))
        if piece.owner.activation_scale is None:
            return piece.compute(*inputs)
        owner = piece.owner
        return piece.compute(_crossed(inputs[0], near, lambda x: codes(owner, smoothed(owner, x))))

    with answering(module, answer):
        yield


def _token_codes(x: Tensor) -> Callable[[Tensor], Tensor]:
    scales = token_scales(x)
    return lambda values: quantize(values, scales, 8)


def _crossed(x: Tensor, rounding: float, codes_of: Callable[[Tensor], Tensor]) -> Tensor:
    step = rounding * x.square().mean().sqrt()
    here = codes_of(x)
    for moved in (x + step, x - step):
        x = torch.where(codes_of(moved) != here, moved, x)
    return x
