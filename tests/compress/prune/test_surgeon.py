"""Optimal brain surgeon beside least squares that know nothing of it."""

from __future__ import annotations

import torch
from torch import Tensor

from diffpress.compress.prune.moments import Moments
from diffpress.compress.prune.surgeon import DAMPING, Reader, refitted, removal_order

OUT, WIDTH, UNITS, ROWS = 5, 3, 8, 40
COLUMNS = [list(range(unit * WIDTH, (unit + 1) * WIDTH)) for unit in range(UNITS)]
ALL = UNITS * WIDTH
ALLOWED = 1e2 * ALL / DAMPING * torch.finfo(torch.double).eps
"""An inverse loses as many digits as its condition has: at most the K columns over the damping; a hundred steps of it."""


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, inputs whose columns have to do with each other, and what is to be answered."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, ALL, generator=generator, dtype=torch.double)
    mixing = torch.randn(ALL, ALL, generator=generator, dtype=torch.double) / ALL**0.5
    x = torch.randn(ROWS, ALL, generator=generator, dtype=torch.double) @ mixing
    return weight, x, x @ weight.T + 0.1 * torch.randn(ROWS, OUT, generator=generator, dtype=torch.double)


def moments(x: Tensor, y: Tensor) -> Moments:
    return Moments(x.T @ x / len(x), y.T @ x / len(x))


def damped(x: Tensor) -> Tensor:
    """[ROWS + K, K] the inputs, and rows that damp: of each column alone."""
    strength = DAMPING * x.square().mean()
    return torch.cat([x / len(x) ** 0.5, strength.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])


def without(weight: Tensor, x: Tensor, gone: list[int]) -> tuple[Tensor, float]:
    """The weight with zeros in those columns that answers most like `weight` to `x`, and its squared error, in all rows."""
    rows = damped(x)
    kept = [column for column in range(ALL) if column not in gone]
    best = torch.zeros_like(weight)
    best[:, kept] = torch.linalg.lstsq(rows[:, kept], rows @ weight.T).solution.T
    return best, float((rows @ (best - weight).T).square().sum())


def test_what_is_lost_with_each_unit_is_what_least_squares_lose() -> None:
    weight, x, y = drawn(0)
    found = Reader.of(weight, moments(x, y), COLUMNS).losses()
    expected = torch.tensor([without(weight, x, columns)[1] for columns in COLUMNS], dtype=torch.double)
    torch.testing.assert_close(found, expected, rtol=ALLOWED, atol=0)


def test_units_that_go_one_after_the_other_leave_the_best_without_all() -> None:
    weight, x, y = drawn(1)
    reader = Reader.of(weight, moments(x, y), COLUMNS)
    for unit in (5, 0, 6):
        reader.remove_(torch.tensor([unit]))
    gone = COLUMNS[5] + COLUMNS[0] + COLUMNS[6]
    expected, _ = without(weight, x, gone)
    torch.testing.assert_close(reader.weight, expected, rtol=0, atol=ALLOWED * float(weight.abs().max()))
    # And the next loss counts what is lost beyond that.
    more = Reader(expected, reader.inverse, reader.columns).losses()[3]
    both = without(weight, x, gone + COLUMNS[3])[1] - without(weight, x, gone)[1]
    torch.testing.assert_close(float(more), both, rtol=ALLOWED, atol=0)


def test_the_order_takes_what_all_readers_together_miss_least() -> None:
    layers = [drawn(seed) for seed in (2, 3)]
    order = removal_order([Reader.of(weight, moments(x, y), COLUMNS) for weight, x, y in layers])
    gone: list[int] = []
    for unit in order:
        losses = {
            other: sum(
                without(weight, x, [c for u in [*gone, other] for c in COLUMNS[u]])[1] for weight, x, _ in layers
            )
            for other in range(UNITS)
            if other not in gone
        }
        assert unit == min(losses, key=lambda other: losses[other])
        gone.append(unit)
    # One stays.
    assert len(order) == UNITS - 1


def test_what_is_fitted_anew_are_damped_least_squares() -> None:
    """Towards what is to be answered, and, by the damping, towards the weight that there is."""
    weight, x, y = drawn(4)
    kept = torch.tensor([column for column in range(ALL) if column not in COLUMNS[2] + COLUMNS[3]])
    rows = damped(x[:, kept])
    damping = rows[ROWS:]
    targets = torch.cat([y / ROWS**0.5, damping @ weight[:, kept].T])
    expected = torch.linalg.lstsq(rows, targets).solution.T
    allowed = ALLOWED * float(expected.abs().max())
    torch.testing.assert_close(refitted(weight, moments(x, y), kept), expected, rtol=0, atol=allowed)
    torch.testing.assert_close(refitted(weight, moments(x[:, kept], y), kept), expected, rtol=0, atol=allowed)
