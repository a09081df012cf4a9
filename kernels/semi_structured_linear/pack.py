"""Two values of every four, and where they stood."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_semi_structured(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The two largest magnitudes of every four columns of `weight` [N, K]: values [N, K / 2] and their places.

    A place takes two bits, the lowest bits of a byte first: uint8 [N, ceil(K / 8)]. Raises ValueError where K is no multiple
    of 4.
    """
    if weight.ndim != 2 or weight.shape[1] % 4:
        raise ValueError(f"weight must be [N, K] with K a multiple of 4, got {list(weight.shape)}")
    fours = weight.unflatten(1, (weight.shape[1] // 4, 4))
    places = fours.abs().topk(2, dim=2).indices.sort(dim=2).values
    fields = pad(places.flatten(1), (0, -places[0].numel() % 4)).unflatten(1, (-1, 4))
    bytes = (fields << _shifts(weight.device)).sum(2).to(torch.uint8)
    return fours.gather(2, places).flatten(1), bytes


def unpack_semi_structured(values: Tensor, positions: Tensor) -> Tensor:
    """The weight [N, K], with zeros where nothing is kept."""
    places = (positions.long()[:, :, None] >> _shifts(values.device)) & 3
    places = places.flatten(1)[:, : values.shape[1]].unflatten(1, (-1, 2))
    fours = values.new_zeros(len(values), places.shape[1], 4)
    return fours.scatter_(2, places, values.unflatten(1, (-1, 2))).flatten(1)


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(0, 8, 2, device=device)
