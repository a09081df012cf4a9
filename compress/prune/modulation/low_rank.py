"""A linear layer on inputs that lie on a curve: two of low rank that stand for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """What N inputs [N, K] are made of: `mean` [K] + `coefficients` [N, R] @ `vectors` [R, K], in float64."""

    mean: Tensor
    coefficients: Tensor
    vectors: Tensor


class Factors(NamedTuple):
    """`up(down(x)) + bias` in place of `weight(x) + bias`; the most important directions first."""

    down: Tensor
    """[R, K]"""
    up: Tensor
    """[M, R]"""
    constant: Tensor
    """[M] what the layer makes of the mean."""
    mean: Tensor
    """[K]"""

    def cut(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first directions alone, and the bias that goes with them: [rank, K], [M, rank] and [M]."""
        down, up = self.down[:rank], self.up[:, :rank]
        return down, up, self.constant - up @ (down @ self.mean)


def span_of(points: Tensor) -> Span:
    """Of `points` [N, K]."""
    mean = points.double().mean(0)
    left, sizes, vectors = torch.linalg.svd(points.double() - mean, full_matrices=False)
    return Span(mean, left * sizes, vectors)


def factorize(weight: Tensor, bias: Tensor | None, span: Span) -> Factors:
    """A layer [M, K] on the inputs of `span`, by the directions in which its outputs move most, relative to their size.

    Outputs Y = C (W V)^T + constant of coefficients C and vectors V; with W V = Q T the singular vectors P of the rows of
    C T^T, each over its output's norm, turn into directions Q P^T of outputs (Eckart and Young, 1936).
    """
    seen = weight.double() @ span.vectors.T
    constant = weight.double() @ span.mean
    if bias is not None:
        constant = constant + bias.double()
    norms = _norms(span.coefficients @ seen.T + constant)
    q, t = torch.linalg.qr(seen)
    p = torch.linalg.svd(span.coefficients @ t.T / norms[:, None], full_matrices=False).Vh
    return Factors(p @ t @ span.vectors, q @ p.T, constant, span.mean)


def _norms(rows: Tensor) -> Tensor:
    """Of each row; where all is zero, a number that divides it."""
    return rows.norm(dim=1).clamp(min=torch.finfo(rows.dtype).tiny)


def largest_error(found: Tensor, expected: Tensor) -> float:
    """The largest, over the rows of [N, M], of the difference's norm relative to that of the row expected."""
    return float(((found - expected).norm(dim=1) / _norms(expected)).max())


def smallest(largest: int, fits: Callable[[int], bool]) -> int:
    """The smallest number from 1 to `largest` that `fits`, as `largest` does and all above it do."""
    low = 0
    while largest - low > 1:
        middle = (low + largest) // 2
        low, largest = (low, middle) if fits(middle) else (middle, largest)
    return largest
