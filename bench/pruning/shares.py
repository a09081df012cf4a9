"""From scores of units to those that go: the same share of every structure, or the lowest of all."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from diffpress.compress.options import Magnitude
from diffpress.compress.prune.candidates import Candidates
from diffpress.compress.prune.magnitude import even_counts

Scores = Mapping[str, Tensor]
"""[units] of each structure; the lowest go first."""
Units = dict[str, list[int]]
"""That go, by the names of structures."""


def lowest_of_each(candidates: Candidates, options: Magnitude, scores: Scores) -> Units:
    """As many of each structure as `magnitude` removes."""
    counts = even_counts(candidates, options)
    return {name: own.argsort()[: counts[name]].tolist() for name, own in scores.items()}


def lowest_of_all(candidates: Candidates, options: Magnitude, scores: Scores) -> Units:
    """By score a parameter over all structures, one unit of each staying; numbers that stay are not rounded."""
    weights, target = candidates.weights.units, candidates.target(options)
    last = {name: int(own.argmax()) for name, own in scores.items()}
    ranked = sorted(
        (float(score) / weights[name], name, unit)
        for name, own in scores.items()
        for unit, score in enumerate(own)
        if unit != last[name]
    )
    gone: Units = {name: [] for name in scores}
    left = target
    for _, name, unit in ranked:
        if left <= 0:
            break
        gone[name].append(unit)
        left -= weights[name]
    return gone
