"""Optimal brain surgeon (Hassibi & Stork 1992): which units a layer misses least, and what is kept makes up for them.

With H = E[x x^T] of a layer's input, its answer W x loses least, without the columns c, where the columns that are kept
become those of W - W_c [(H^-1)_cc]^-1 (H^-1)_c; the loss is tr(W_c [(H^-1)_cc]^-1 W_c^T). The inverse of what is left is
H^-1 - (H^-1)_c^T [(H^-1)_cc]^-1 (H^-1)_c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import Moments

DAMPING = 1e-2
"""Of the mean of H's diagonal, added to it."""
ROUNDS = 64
"""In which units go: the loss of those that go together is counted one by one, which saves a product for each."""


@dataclass
class Reader:
    """A layer that reads units: W [out, K], H^-1 [K, K], and the columns of each unit [units, width]."""

    weight: Tensor
    inverse: Tensor
    columns: Tensor

    @classmethod
    def of(cls, weight: Tensor, moments: Moments, columns: Sequence[Sequence[int]]) -> Reader:
        """Of what a layer is fed; the weight is changed in place."""
        inverse = torch.linalg.inv(damped(moments.xx))
        return cls(weight.clone(), inverse, torch.tensor(columns, device=weight.device))

    def losses(self) -> Tensor:
        """[units] What is lost with each."""
        w = self.weight[:, self.columns].transpose(0, 1)
        h = self.inverse[self.columns[:, :, None], self.columns[:, None, :]]
        return (torch.linalg.solve(h, w.transpose(1, 2)) * w.transpose(1, 2)).sum((1, 2))

    def remove_(self, units: Tensor) -> None:
        """Let what is kept make up for these units."""
        c = self.columns[units].flatten()
        solved = torch.linalg.solve(self.inverse[c][:, c], self.inverse[c])
        self.weight -= self.weight[:, c] @ solved
        self.inverse -= self.inverse[:, c] @ solved
        # What is gone stays apart from everything, and invertible.
        self.inverse[c, c] = 1.0


def removal_order(readers: Sequence[Reader]) -> list[int]:
    """All units but one in the order in which they go; several layers may read them."""
    count = len(readers[0].columns)
    order: list[int] = []
    gone = torch.zeros(count, dtype=torch.bool, device=readers[0].weight.device)
    while len(order) < count - 1:
        losses = torch.stack([reader.losses() for reader in readers]).sum(0).masked_fill(gone, torch.inf)
        units = losses.argsort()[: min(max(1, count // ROUNDS), count - 1 - len(order))]
        for reader in readers:
            reader.remove_(units)
        gone[units] = True
        order += units.tolist()
    return order


def refitted(weight: Tensor, moments: Moments, kept: Tensor) -> Tensor:
    """[out, kept] the weights of the columns `kept` with which a layer comes closest to what it is to answer.

    Damped towards the `weight` [out, K] that it has: (E[y x^T] + d W) (E[x x^T] + d I)^-1, each of the columns that are kept.
    `moments` are of all columns, or of those that are kept.
    """
    xx, yx, own = moments.xx, moments.yx, weight[:, kept]
    if len(xx) != len(kept):
        xx, yx = xx[kept][:, kept], yx[:, kept]
    return torch.linalg.solve(damped(xx), (yx + DAMPING * xx.diagonal().mean() * own).t()).t()


def damped(xx: Tensor) -> Tensor:
    """H, invertible whatever was seen."""
    return xx + DAMPING * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
